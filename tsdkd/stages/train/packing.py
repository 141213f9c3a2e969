"""What training on packed micro-batches needs of its sequences and of the student."""

from tsdkd.errors import InputError
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.models.language_model import LanguageModel


def require_packed_length(longest: int, config: TrainConfig) -> None:
    """Raises InputError for a sequence that no packed micro-batch holds: its memory would exceed the limit."""
    tokens = config.micro_batch_tokens
    if tokens and longest > tokens:
        reach, others = "reach", ""
        if config.online and config.online.samples_responses:
            reach, others = "can reach", ", or lower --max-new-tokens or --max-prompt-tokens"
        raise InputError(
            f"A prompt and its response {reach} {longest:,} tokens, more than --micro-batch-tokens {tokens:,}.",
            f"Raise it to {longest}{others}.",
        )


def require_packing(student: LanguageModel) -> None:
    """Raises InputError for a student that cannot read packed batches."""
    if student.packing_problem:
        raise InputError(
            f"{student.name} {student.packing_problem}, but --micro-batch-tokens packs batches.",
            "Give --micro-batch-size in its place.",
        )
