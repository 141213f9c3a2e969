"""Configuration of `tsdkd generate`."""

from dataclasses import dataclass, fields
from typing import Any

from tsdkd.core.config import MAX_TEMPERATURE, MIN_TEMPERATURE
from tsdkd.errors import InputError
from tsdkd.stages.config.chat import ChatConfig, recorded_config
from tsdkd.stages.config.groups import DATA, ENGINE, SAMPLING, VLLM
from tsdkd.stages.config.option import nested, option
from tsdkd.stages.config.types import (
    DTYPE_HELP,
    DType,
    EngineName,
    Policy,
    Turns,
    attention_option,
    data_parallel_option,
    ray_option,
)

AUTHORS = {
    "student": ("student",),
    "teacher": ("teacher",),
    "mixed": ("student", "teacher"),
    "speculative": ("both",),
    "teacher-mixed": ("mixture",),
    "given": ("given",),
}
"""Authors of the responses, by policy."""
GIVEN = "given"
"""The policy, and the author, of responses that the prompts' rows hold."""
PROMPT_COLUMNS = "messages, else prompt"
"""The default of --column, in words."""
MEMORY_FRACTION = 0.9
"""The fraction of its devices' memory that vLLM takes if nothing else runs on them."""
JOINT_AUTHORS = ("both", "mixture")
"""Authors that combine both models in one response."""


@dataclass(frozen=True)
class GenerateConfig:
    """How responses are sampled."""

    policy: Policy = option(
        "student",
        "Models that write the responses. mixed: one of them for each prompt. given: none, the rows hold responses.",
        group=SAMPLING,
        common=True,
    )
    """speculative: the teacher replaces the student's unlikely tokens. teacher-mixed: each token is sampled from a
    mixture of both distributions."""
    student_fraction: float = option(
        0.5, "Mixed: fraction of prompts that the student responds to.", group=SAMPLING, name="lambda", min_=0, max_=1
    )
    accept_k: int = option(
        25, "Speculative: student tokens among the teacher's best N are accepted.", group=SAMPLING, min_=1
    )
    draft_tokens: int = option(
        8, "Speculative, teacher-mixed: tokens drafted per teacher pass; affects speed only.", group=SAMPLING, min_=1
    )
    teacher_fraction: float = option(
        0.2, "Teacher-mixed: the teacher's weight in the mixture.", group=SAMPLING, min_=0, max_=1
    )
    """The alpha of MiniLLM (Gu et al. 2024)."""
    samples_per_prompt: int = option(1, "Responses per prompt.", group=SAMPLING, min_=1, common=True)
    temperature: float = option(1.0, "Sampling temperature; 0: greedy.", group=SAMPLING, min_=0, common=True)
    top_p: float = option(1.0, "Nucleus sampling.", group=SAMPLING, min_=0, max_=1)
    max_new_tokens: int = option(512, "Longest response, in tokens.", group=SAMPLING, min_=1, common=True)
    rollout_tokens: int | None = option(
        None,
        "Cut each response after N tokens on purpose (early stopping rollout); below --max-new-tokens.",
        group=SAMPLING,
        min_=1,
        shown="whole responses",
    )
    """Zhou et al. 2026 (arXiv 2605.27028)."""
    stop: tuple[str, ...] = option(
        (),
        "Text that ends a response, besides the end tokens; repeatable.",
        group=SAMPLING,
        metavar="TEXT",
        repeatable=True,
    )
    """The response keeps the token that completes the text; it gets no end token."""
    max_prompt_tokens: int = option(512, "Longer prompts are skipped.", group=SAMPLING, min_=1)
    """With 512 new tokens, sequences reach the length of Table 10: 1024."""
    limit: int | None = option(None, "Use only the first N prompts.", group=DATA, min_=1, common=True)
    column: str | None = option(
        None, "Column with messages or text.", group=DATA, shown=f"{PROMPT_COLUMNS}; given: or conversations"
    )
    config_name: str | None = option(
        None, "Configuration of a dataset.", group=DATA, metavar="NAME", shown="the only one"
    )
    split: str | None = option(None, "Split of a dataset.", group=DATA, metavar="NAME", shown="train")
    response_column: str | None = option(
        None, "Given: column with the response to the prompt.", group=DATA, shown="response, else completion"
    )
    teacher_by: str | None = option(
        None,
        "Column that names the teacher of each prompt, such as source; with several --teacher NAME=MODEL.",
        group=DATA,
        metavar="COLUMN",
        shown="one teacher",
    )
    turns: Turns = option("all", "Given: the assistant's turns that are learned.", group=DATA)
    system: str | None = option(None, "System message for prompts without one.", group=SAMPLING, shown="none")
    chat: ChatConfig = nested(ChatConfig)
    engine: EngineName = option(
        "auto", "Engine that samples. auto: vLLM where it is installed.", group=ENGINE, common=True
    )
    """speculative and teacher-mixed need transformers."""
    batch_size: int = option(32, "Transformers: responses sampled at a time.", group=ENGINE, min_=1)
    part_size: int | None = option(
        None,
        "Responses per part; an interruption loses one part.",
        group=ENGINE,
        min_=1,
        shown="256; vLLM, given: 2048",
    )
    dtype: DType = option("auto", DTYPE_HELP, group=ENGINE)
    attention: str | None = attention_option()
    data_parallel: int | None = data_parallel_option()
    ray: str | None = ray_option()
    tensor_parallel: int = option(1, "GPUs per copy of the model.", group=VLLM, min_=1)
    memory_fraction: float | None = option(
        None,
        "Fraction of the GPU's memory (or the machine's) for weights and cache.",
        group=VLLM,
        min_=0,
        max_=1,
        shown=str(MEMORY_FRACTION),
    )
    max_model_len: int | None = option(
        None, "Longest sequence, in tokens.", group=VLLM, min_=1, shown="as the prompts need"
    )
    quantization: str | None = option(
        None, "Quantisation of the weights, such as fp8.", group=VLLM, metavar="NAME", shown="as saved"
    )

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE):
            raise InputError(
                f"The sampling temperature is {self.temperature}.",
                f"Choose 0, or a value between {MIN_TEMPERATURE:g} and {MAX_TEMPERATURE:g}.",
            )
        if "" in self.stop:
            raise InputError("A stop string is empty.", "Give --stop a text, or leave it out.")
        if self.rollout_tokens and self.rollout_tokens >= self.max_new_tokens:
            raise InputError(
                f"--rollout-tokens {self.rollout_tokens} cuts no response: --max-new-tokens is {self.max_new_tokens}.",
                "Lower --rollout-tokens, or leave it out.",
            )

    @property
    def response_limit(self) -> int:
        """Tokens of the longest response that is sampled."""
        return self.rollout_tokens or self.max_new_tokens


SPEED_ONLY_FIELDS = ("data_parallel", "ray", "memory_fraction")
"""Fields of `GenerateConfig` that an artifact does not record."""
RECORDED_IF_SET = ("stop", "rollout_tokens", "teacher_by")
"""Fields of `GenerateConfig` that artifacts of earlier versions lack."""
GIVEN_ONLY_FIELDS = ("response_column", "turns")
"""Fields that only the policy "given" reads."""
GIVEN_FIELDS = (
    *("policy", "max_new_tokens", "max_prompt_tokens", "limit", "column", "config_name", "split", "system", "chat"),
    *("part_size", "teacher_by", *GIVEN_ONLY_FIELDS),
)
"""Fields that the policy "given" reads."""


def recorded_sampling(config: GenerateConfig) -> dict[str, Any]:
    """The settings that an artifact records."""
    settings = recorded_config(config)
    unset = [name for name in RECORDED_IF_SET if not settings[name]]
    if config.policy == GIVEN:
        return {name: value for name, value in settings.items() if name in GIVEN_FIELDS and name not in unset}
    unrecorded = (*SPEED_ONLY_FIELDS, *GIVEN_ONLY_FIELDS, *unset)
    return {name: value for name, value in settings.items() if name not in unrecorded}


def require_effective(config: GenerateConfig) -> None:
    """Raises InputError for an option that has no effect on responses that are given, or that are sampled."""
    given = config.policy == GIVEN
    for field in fields(config):
        if (field.name in GIVEN_FIELDS) if given else (field.name not in GIVEN_ONLY_FIELDS):
            continue
        if getattr(config, field.name) != field.default:
            option_name = "lambda" if field.name == "student_fraction" else field.name.replace("_", "-")
            raise InputError(
                f"--{option_name} has no effect on --policy {config.policy}.",
                "Leave it out." if given else "Leave it out, or choose --policy given.",
            )
