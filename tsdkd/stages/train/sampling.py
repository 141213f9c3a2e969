"""How responses are sampled during training: the engine, the ids that end them, and the sampler."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from tsdkd.errors import InputError
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig
from tsdkd.stages.config.types import DType, EngineName
from tsdkd.stages.data.online import ResponseSampler
from tsdkd.stages.data.online_teachers import LoadedTeacher, OnlineTeacher
from tsdkd.stages.engines.choice import choose_engine, require_vllm
from tsdkd.stages.engines.ends import require_stop_support
from tsdkd.stages.engines.online import LocalSampler
from tsdkd.stages.engines.online_vllm import lora_arguments, open_vllm_sampler, require_rollout_gpus
from tsdkd.stages.engines.vllm_served import ServedEngine
from tsdkd.stages.models.chat import pair_end_ids
from tsdkd.stages.models.device import default_device
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.spec import ModelSpec
from tsdkd.stages.observer import Observer


def find_ends(specs: list[ModelSpec], online: OnlineConfig, observer: Observer) -> list[int]:
    """The ids that end a response. Warns without any; raises InputError for stop strings that cannot be found."""
    tokenizer, sampling = specs[0].tokenizer, online.sampling
    require_stop_support(sampling, tokenizer)
    ends = pair_end_ids(tokenizer, *(spec.end_ids for spec in specs))
    if not ends and not sampling.stop and online.samples_responses:
        observer.warning(f"The models have no end token: responses have {sampling.response_limit} tokens.")
    return ends


def with_engine(online: OnlineConfig, precision: str, observer: Observer, *, quantized: bool = False) -> OnlineConfig:
    """With the engine that samples, in the precision of the student's forward.

    Raises InputError if the engine does not fit --rollout-url, --rollout-gpus or --rollout-ahead, or if a GPU is
    missing.
    """
    option = "--rollout-url" if online.rollout_url else "--rollout-gpus" if online.rollout_gpus else None
    needed = ["--engine vllm"] * (online.sampling.engine == "transformers")
    needed += ["--teacher-fraction 0"] * bool(online.teacher_fraction)
    if option and needed:
        raise InputError(
            f"{option} needs vLLM, but transformers samples these responses.",
            f"Leave out {option}, or give {' and '.join(needed)}.",
        )
    if option and quantized:
        raise InputError("vLLM does not sample from a student with --quantize.", f"Leave out {option}.")
    engine: EngineName = "vllm" if online.rollout_url else choose_engine(online.sampling, quantized=quantized)
    if online.rollout_gpus:
        require_vllm()
        require_rollout_gpus(online.rollout_gpus)
        engine = "vllm"
    if online.rollout_ahead:
        _require_overlap(engine, option)
    authors = "student and teacher together" if online.teacher_fraction else "the student"
    served = f" at {online.rollout_url}" if online.rollout_url else ""
    if online.samples_responses:
        observer.info(f"Responses are sampled from {authors} with {engine}{served}.")
    else:
        observer.info("No responses are sampled: the student learns from recorded ones.")
    dtype: DType = "bfloat16" if precision == "bfloat16" else "float32"
    return replace(online, sampling=replace(online.sampling, engine=engine, dtype=dtype))


def _require_overlap(engine: EngineName, option: str | None) -> None:
    """Raises InputError where the engine cannot sample while the student learns."""
    if engine == "transformers":
        raise InputError(
            "--rollout-ahead needs vLLM: transformers samples in the process that learns.",
            "Give --engine vllm with --teacher-fraction 0, or leave out --rollout-ahead.",
        )
    if option is None and default_device() == "cuda":
        raise InputError(
            "--rollout-ahead needs GPUs for vLLM: it sleeps on the student's GPU while the student learns.",
            "Give --rollout-gpus or --rollout-url, or leave out --rollout-ahead.",
        )


def require_rollout_server(student: ModelSpec, online: OnlineConfig, lora: LoRAConfig | None, max_length: int) -> None:
    """Raises InputError for a server of --rollout-url that does not sample as an engine of this run."""
    if online.rollout_url and online.samples_responses:
        with ServedEngine(online.rollout_url, student, online.sampling, max_length, lora_arguments(student, lora)):
            pass


def open_sampler(
    student: ModelSpec,
    learner: LanguageModel,
    teacher: OnlineTeacher,
    online: OnlineConfig,
    lora: LoRAConfig | None,
    max_length: int,
    observer: Observer,
) -> AbstractContextManager[ResponseSampler]:
    """`learner`: the student in memory. All ranks call it together. vLLM starts only if responses are sampled."""
    sampling = online.sampling
    if sampling.engine == "transformers" or not online.samples_responses:
        mixed = teacher.model if isinstance(teacher, LoadedTeacher) and sampling.policy == "teacher-mixed" else None
        return nullcontext(LocalSampler(sampling, mixed))
    return open_vllm_sampler(student, learner, online, lora, max_length, observer)
