"""Checks of weights: a model's files hold every tensor of its architecture and no other, and all values are finite."""

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from tsdkd.artifacts.json_files import read_json
from tsdkd.artifacts.rules import PartName
from tsdkd.errors import InputError, first_line
from tsdkd.stages.config.types import DType
from tsdkd.stages.models.adapters import is_adapter

WEIGHT_FILES = (
    (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
    (WEIGHTS_NAME, WEIGHTS_INDEX_NAME),
    ("adapter_model.safetensors", ""),
    ("adapter_model.bin", ""),
)
"""A single file, and the index of several, in transformers' order."""
NAMES_SHOWN = 3
UNUSED = re.compile(
    r"\b(attn|attention)\.(bias|masked_bias|causal_mask)$"  # causal masks, which older versions saved
    r"|(^|\.)(mtp|visual|vision_\w+|audio_\w+|multi_modal_projector|embed_vision|embed_audio)\."
)
"""Tensors that a language model may be saved with and does not compute with: masks, other modalities, draft layers."""


def check_saved_tensors(name: str, directory: Path) -> None:
    """Check the names and shapes of a model's saved tensors, without reading their values.

    Raises InputError if they are not those of its architecture, or a file is missing or damaged. The tensors of an
    adapter are compared with its base model when both are loaded.
    """
    with _readable(name):
        if is_adapter(directory):
            weight_files(directory)
        else:
            _require_architecture(name, directory)


def check_saved_values(name: str, directory: Path, dtype: DType) -> None:
    """Read a model's files, for an engine that loads them itself.

    Raises InputError unless all values are finite in `dtype`.
    """
    with _readable(name):
        precision = None if dtype == "auto" else getattr(torch, dtype)
        require_finite(name, saved_tensors(weight_files(directory)), precision)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # transformers and safetensors raise errors of many types
        raise InputError(
            f"{name} has weights that cannot be read ({first_line(error)}).",
            "Check that config.json belongs to these weights, or copy its files again.",
        ) from None


def _require_architecture(name: str, directory: Path) -> None:
    """Load a model without its data, to compare the names and shapes of its tensors with its architecture.

    A quantised model, and one that transformers does not load as a causal language model, are left to their engine.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "quantization_config", None):
        return
    with torch.device("meta"):
        architecture = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model, report = type(architecture).from_pretrained(
        None,
        config=architecture.config,
        state_dict=dict(saved_tensors(weight_files(directory), "meta")),
        device_map={"": "meta"},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    require_all_tensors(name, model, report)


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose weights take no memory."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            deepcopy(config), experts_implementation="batched_mm", trust_remote_code=False
        )
    return model


@dataclass(frozen=True, slots=True)
class WeightIndex:
    """The file that holds each tensor of sharded weights, as transformers writes it."""

    weight_map: dict[str, PartName]


def weight_files(directory: Path) -> list[Path]:
    """The files with a model's or an adapter's weights that transformers reads. Raises InputError if one is missing."""
    for single, index in WEIGHT_FILES:
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            shards = sorted(set(read_json(directory / index, WeightIndex).weight_map.values()))
            if missing := [shard for shard in shards if not (directory / shard).is_file()]:
                raise InputError(
                    f"{missing[0]}, one of {len(shards)} weight files, is missing in {directory}.", "Copy it there."
                )
            return [directory / shard for shard in shards]
    raise InputError(f"{directory} has no weights.", "Name a directory with model.safetensors (or its shards).")


def weight_bytes(directory: Path) -> int:
    """The bytes of a model's weights as they are saved."""
    return sum(file.stat().st_size for file in weight_files(directory))


def saved_tensors(files: Iterable[Path], device: str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """The tensors of some files by name, one at a time; on the device "meta" without their data."""
    for file in files:
        if device == "meta" or file.suffix != ".safetensors":
            yield from load_state_dict(str(file), map_location=device).items()
            continue
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    yield key, tensors.get_tensor(key)
        except SafetensorError as error:
            raise InputError(f"{file} cannot be read ({first_line(error)}).", "Copy or download it again.") from None


def require_all_tensors(name: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Raises InputError if transformers' loading report names missing, unused or misshapen tensors."""
    missing: set[str] = report["missing_keys"]
    unexpected = {key for key in report["unexpected_keys"] if not _is_unused(model, key)}
    shapes = {f"{key} {tuple(saved)} for {tuple(own)}" for key, saved, own in report["mismatched_keys"]}
    findings = [
        f"{len(keys)} {verb} ({', '.join(sorted(keys)[:NAMES_SHOWN])}{', …' if len(keys) > NAMES_SHOWN else ''})"
        for keys, verb in ((missing, "missing"), (unexpected, "not in the architecture"), (shapes, "of another shape"))
        if keys
    ]
    if findings:
        raise InputError(
            f"The tensors of {name} do not match {type(model).__name__}: {', '.join(findings)}.",
            _remedy(model, missing, unexpected),
        )


def _is_unused(model: PreTrainedModel, key: str) -> bool:
    """Whether the model computes the same without a tensor that its files hold."""
    text = model.config.get_text_config()
    draft_layers = getattr(text, "num_nextn_predict_layers", None) or 0
    first = getattr(text, "num_hidden_layers", 0)
    layer = re.search(r"\blayers\.(\d+)\.", key)
    is_draft = layer is not None and first <= int(layer[1]) < first + draft_layers
    return is_draft or UNUSED.search(key) is not None or key in dict(model.named_buffers())


def _remedy(model: PreTrainedModel, missing: Set[str], unexpected: Set[str]) -> str:
    head: Any = model.get_output_embeddings()
    if missing and head and missing <= {key for key, value in model.named_parameters() if value is head.weight}:
        return "Save it with its head; if its head is its embedding, write tie_word_embeddings: true into config.json."
    if any(".lora_" in key or ".base_layer." in key for key in unexpected):
        return "Merge the adapter into its base model (merge_and_unload) before you save it."
    untied = missing - set(model.all_tied_weights_keys or ())
    for key in unexpected:
        for prefix in {key.removesuffix(other) for other in untied if key.endswith(other)}:
            if all(prefix + other in unexpected for other in untied):
                return f"Every name begins with {prefix!r}: remove this from the names, and save the file again."
    return "Check that config.json (architecture, layers, sizes) belongs to these weights, and copy both again."


def require_finite(name: str, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> None:
    """Raises InputError for a tensor that holds NaN or infinite values, as they are or converted to `dtype`."""
    for key, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel() or tensor.dtype == torch.float4_e2m1fn_x2:
            continue  # four bits have neither NaN nor infinity
        values = tensor.detach().float() if tensor.itemsize == 1 else tensor.detach()
        precision = dtype or values.dtype
        if not torch.stack(torch.aminmax(values)).to(precision).isfinite().all():
            in_float16 = "Load it in bfloat16 or float32 (--dtype), or use" if precision == torch.float16 else "Use"
            raise InputError(
                f"{name} has NaN or infinite weights in {str(precision).removeprefix('torch.')}: {key}.",
                f"{in_float16} another save of the model.",
            )


def loaded_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model in memory, on disk where they are offloaded, one module at a time."""
    for prefix, module in model.named_modules():
        with align_module_device(module):
            for key, tensor in module.state_dict().items():
                if "." not in key:
                    yield f"{prefix}.{key}".removeprefix("."), tensor


def record_tying(model: PreTrainedModel) -> None:
    """Make the config say whether the head is the embedding.

    transformers reads an untied head from the files even if the config ties it, or if the config of the text model
    contradicts the config of the whole model. A copy made from the config would then have another head.
    """
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    for config in (model.config, model.config.get_text_config()):
        if bool(getattr(config, "tie_word_embeddings", False)) != tied:
            config.tie_word_embeddings = tied
