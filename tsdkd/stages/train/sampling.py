"""How responses are sampled during training: the engine, the ids that end them, and the sampler."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from tsdkd.errors import InputError
from tsdkd.processes import world_size
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.train import OnlineConfig
from tsdkd.stages.config.types import DType
from tsdkd.stages.data.online import ResponseSampler
from tsdkd.stages.data.online_teachers import LoadedTeacher, OnlineTeacher
from tsdkd.stages.engines.choice import choose_engine
from tsdkd.stages.engines.ends import require_stop_support
from tsdkd.stages.engines.online import LocalSampler
from tsdkd.stages.models.chat import pair_end_ids
from tsdkd.stages.models.spec import ModelSpec
from tsdkd.stages.observer import Observer


def find_ends(specs: list[ModelSpec], online: OnlineConfig, observer: Observer) -> list[int]:
    """The ids that end a response. Warns without any; raises InputError for stop strings that cannot be found."""
    tokenizer, sampling = specs[0].tokenizer, online.sampling
    require_stop_support(sampling, tokenizer)
    ends = pair_end_ids(tokenizer, *(spec.end_ids for spec in specs))
    if not ends and not sampling.stop and (online.student_fraction or online.replay):
        observer.warning(f"The models have no end token: responses have {sampling.response_limit} tokens.")
    return ends


def with_engine(online: OnlineConfig, precision: str, observer: Observer, *, quantized: bool = False) -> OnlineConfig:
    """With the engine that samples, in the precision of the student's forward."""
    engine = choose_engine(online.sampling, quantized=quantized)
    if engine == "vllm" and world_size() > 1:
        if online.sampling.engine == "vllm":
            raise InputError("vLLM samples for one training process, not several.", "Leave out --engine vllm.")
        engine = "transformers"
    authors = "student and teacher together" if online.teacher_fraction else "the student"
    observer.info(f"Responses are sampled from {authors} with {engine}.")
    dtype: DType = "bfloat16" if precision == "bfloat16" else "float32"
    return replace(online, sampling=replace(online.sampling, engine=engine, dtype=dtype))


def open_sampler(
    student: ModelSpec, teacher: OnlineTeacher, sampling: GenerateConfig, max_length: int
) -> AbstractContextManager[ResponseSampler]:
    if sampling.engine == "transformers":
        mixed = teacher.model if isinstance(teacher, LoadedTeacher) and sampling.policy == "teacher-mixed" else None
        return nullcontext(LocalSampler(sampling, mixed))
    from tsdkd.stages.engines.online_vllm import open_vllm_sampler

    return open_vllm_sampler(student, sampling, max_length)
