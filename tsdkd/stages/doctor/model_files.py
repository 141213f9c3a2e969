"""Findings from the files of both models: sizes, vocabularies, end tokens and precision; no weights are loaded."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig

from tsdkd.artifacts.manifest import ModelRecord
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.config.types import DType
from tsdkd.stages.doctor.findings import Finding, finding
from tsdkd.stages.models.attention import require_attention
from tsdkd.stages.models.chat import turn_end_ids
from tsdkd.stages.models.model_size import parameter_count
from tsdkd.stages.models.record import model_record, require_same_tokenizer
from tsdkd.stages.models.spec import ModelSpec, load_config, load_spec
from tsdkd.stages.models.tokenizers import vocab_size
from tsdkd.stages.models.weights import saved_tensors, weight_files

GROUP, LEVELS = 32, 16
"""4-bit weights have at most 16 values in each group of 32, also after they are converted to a wider precision."""
PROBED_ROWS = 8
"""Rows of each matrix whose values are counted."""


@dataclass(frozen=True)
class ModelFiles:
    """A model as its files describe it."""

    role: str
    spec: ModelSpec
    record: ModelRecord
    config: PreTrainedConfig
    parameters: int
    saved: Counter[torch.dtype]
    """Numbers of saved values by precision."""

    @property
    def rows(self) -> int:
        """Rows of the output head."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def saved_dtype(self) -> torch.dtype:
        """The precision of most weights."""
        return self.saved.most_common(1)[0][0]

    @property
    def quantization(self) -> str:
        """The method that quantised the saved weights; empty if the config names none."""
        settings = getattr(self.config, "quantization_config", None)
        settings = settings if isinstance(settings, dict) or settings is None else settings.to_dict()
        return str(settings.get("quant_method", "unnamed method")) if settings else ""


Pair = tuple[ModelFiles, ModelFiles]
"""Student and teacher."""


def read_model_files(role: str, name: str, attention: str | None, chat: ChatConfig | None = None) -> ModelFiles:
    """Raises InputError for a model that a stage would refuse before it loads the weights.

    `chat`: as for `load_tokenizer`.
    """
    spec, config = load_spec(name, chat), load_config(name)
    record = model_record(role, name, hashed=False, chat=chat)
    turn_end_ids(spec.tokenizer)  # refuses a chat template that does not end, once
    require_attention(attention, [name])
    saved = Counter[torch.dtype]()
    for _, tensor in saved_tensors(weight_files(spec.directory), "meta"):
        saved[tensor.dtype] += tensor.numel()
    return ModelFiles(role, spec, record, config, parameter_count(config), saved)


def check_models(pair: Pair) -> Finding:
    """Stops at one model in both roles: it has nothing to learn from itself."""
    student, teacher = pair
    sizes = [f"{m.role} {m.spec.name} ({m.config.model_type}, {m.parameters:,} parameters)" for m in pair]
    values = {f"{m.role}_parameters": m.parameters for m in pair}
    if len({(m.spec.directory.resolve(), m.spec.adapter and m.spec.adapter.resolve()) for m in pair}) == 1:
        problem, remedy = "They are the same model.", "Name another one as --student."
        return finding("models", f"{sizes[0]}, {sizes[1]}.", problem, remedy, "stop", values=values)
    problem = "The teacher is not larger." if teacher.parameters <= student.parameters else ""
    remedy = "Check that --student and --teacher are not swapped."
    return finding("models", f"{sizes[0]}, {sizes[1]}.", problem, remedy, values=values)


def check_tokenizer(pair: Pair) -> Finding:
    """Raises InputError for different tokenizers."""
    require_same_tokenizer(*(model.record for model in pair))
    tokens = len(pair[0].spec.tokenizer)
    return finding(
        "tokenizer", f"Both models have the same {tokens:,} tokens with the same ids.", values={"tokens": tokens}
    )


def check_vocabulary(pair: Pair) -> Finding:
    """Compares the rows of both heads with the ids of the tokenizer."""
    vocab, shared = vocab_size(pair[0].spec.tokenizer), min(model.spec.vocab for model in pair)
    values: dict[str, Any] = {"tokenizer": vocab, "shared": shared} | {f"{m.role}_rows": m.rows for m in pair}
    reason = (
        f"Heads of {pair[0].rows:,} and {pair[1].rows:,} rows and a tokenizer of {vocab:,} ids are compared on "
        f"{shared:,} ids; further rows are padding, which is never sampled."
    )
    problem = f"{vocab - shared:,} added tokens have no row in one head." if shared < vocab else ""
    return finding(
        "vocabulary", reason, problem, "Use prompts and a chat template without these tokens.", values=values
    )


def check_end_tokens(model: ModelFiles) -> Finding:
    """Whether a model can stop: it needs end tokens, among them the one that ends a turn in its chat template."""
    tokenizer, ends, turn_ends = model.spec.tokenizer, model.spec.end_ids, turn_end_ids(model.spec.tokenizer)
    name = f"{model.role}_end_tokens"
    values: dict[str, Any] = {"end_ids": ends, "turn_end_ids": turn_ends}
    if not ends and not turn_ends:
        remedy = "Write the id of the token that ends a turn into eos_token_id of its generation_config.json."
        return finding(
            name,
            "No token ends a response:",
            "each response has --max-new-tokens tokens.",
            remedy,
            "stop",
            values=values,
        )
    reason = f"Responses end with {_tokens(tokenizer, sorted({*ends, *turn_ends}))}."
    if missing := [i for i in turn_ends if i not in ends]:
        reason += f" The chat template ends a turn with {_tokens(tokenizer, missing)}, but the model's files do not."
    return finding(name, reason, values=values)


def check_same_end(pair: Pair) -> Finding:
    ends = [set(model.spec.end_ids) for model in pair]
    only = [
        _tokens(model.spec.tokenizer, sorted(own - other))
        for model, own, other in zip(pair, ends, ends[::-1], strict=True)
    ]
    shared = _tokens(pair[0].spec.tokenizer, sorted(ends[0] & ends[1]))
    reason = f"Both models end with {shared}." if shared else "The models share no end token."
    apart = [f"only the {model.role} ends with {tokens}" for model, tokens in zip(pair, only, strict=True) if tokens]
    if apart:
        differing = f"{' and '.join(apart)}.".replace("only", "Only", 1)
        reason += f" {differing} Responses end with any of them, and the checkpoint gets the teacher's."
    return finding(
        "same_end_tokens",
        reason,
        values={m.role: sorted(own) for m, own in zip(pair, ends, strict=True)},
    )


def check_pad_token(model: ModelFiles) -> Finding:
    """tsdkd masks padding by position, so the padding token has no effect; other trainers may mask its id."""
    tokenizer = model.spec.tokenizer
    pad, is_end = tokenizer.pad_token_id, tokenizer.pad_token_id in model.spec.end_ids
    reason = "No padding token." if pad is None else f"The padding token is {_tokens(tokenizer, [pad])}."
    if is_end:
        reason += " It is an end token, too: tsdkd masks padding by position, so the student learns it."
    return finding(f"{model.role}_pad_token", reason, values={"pad": pad, "pad_is_end": is_end})


def check_precision(model: ModelFiles, other: ModelFiles, dtype: DType) -> Finding:
    """Whether a model's weights are or were quantised, or have a lower precision than the other model's."""
    loaded: torch.dtype = getattr(torch, model.spec.resolve_dtype(dtype))
    saved = model.saved_dtype
    reason = f"Weights are saved in {_name(saved)} and loaded in {_name(loaded)}."
    levels = _quantised_fraction(model)
    problems = [
        *([f"They are quantised ({model.quantization})."] if model.quantization else []),
        *(
            [f"Their precision is below the {other.role}'s ({_name(other.saved_dtype)})."]
            * (saved.itemsize < other.saved_dtype.itemsize)
        ),
        *(["Loading lowers their precision."] * (loaded.itemsize < saved.itemsize)),
        *(
            [f"{levels:.0%} of the matrices have at most {LEVELS} values in {GROUP} neighbours, like 4-bit weights."]
            * (levels > 0)
        ),
    ]
    remedy = (
        "Use the model's original weights if there are any, or check that this is the model that you mean to distil."
    )
    values = {"saved": _name(saved), "loaded": _name(loaded), "quantization": model.quantization, "from_4_bits": levels}
    return finding(f"{model.role}_precision", reason, " ".join(problems), remedy, values=values)


def _quantised_fraction(model: ModelFiles) -> float:
    """The fraction of the sampled matrices whose neighbouring weights have as few values as 4 bits."""
    few = [_has_few_values(rows) for rows in _sampled_rows(model)]
    return sum(few) / len(few) if few else 0.0


def _has_few_values(rows: torch.Tensor) -> bool:
    groups = rows[:, : rows.shape[1] // GROUP * GROUP].reshape(-1, GROUP).sort(-1).values
    counts = 1 + (groups.diff(dim=-1) != 0).sum(-1)
    return bool((counts <= LEVELS).all() and (counts > 1).any())


def _sampled_rows(model: ModelFiles) -> Iterator[torch.Tensor]:
    """The first rows of each floating matrix that is wide enough, without the rest of the file."""
    for file in weight_files(model.spec.directory):
        if file.suffix != ".safetensors":
            continue
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(key)
                shape = part.get_shape()
                if (
                    len(shape) == 2
                    and shape[1] >= GROUP
                    and (rows := part[:PROBED_ROWS]).dtype.itemsize > 1
                    and rows.is_floating_point()
                ):
                    yield rows.float()


def _tokens(tokenizer: Any, ids: list[int]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in ids)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
