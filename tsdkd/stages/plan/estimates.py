"""Estimates the bytes and seconds of one stage from model shapes, token counts and two measured rates.

A forward pass costs two operations per weight and token; training adds two to four for the backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil

from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import AUTHORS, JOINT_AUTHORS, MEMORY_FRACTION, GenerateConfig
from tsdkd.stages.config.optimizer import FLOAT32_BYTES
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.config.types import DType
from tsdkd.stages.data.score_cost import BLOCK_BYTES, score_cost
from tsdkd.stages.data.scoring import CHUNK_BYTES
from tsdkd.stages.methods import find_method
from tsdkd.stages.models.device import total_memory
from tsdkd.stages.models.memory import estimate_training_memory, optimizer_bytes
from tsdkd.stages.models.model_size import fitting_batch_size
from tsdkd.stages.plan.benchmark_lengths import benchmark_length
from tsdkd.stages.plan.chain import Workload
from tsdkd.stages.plan.models import PlannedModel
from tsdkd.stages.plan.rates import Rates
from tsdkd.stages.results.benchmarks import BENCHMARKS

ModelFractions = Sequence[tuple[PlannedModel, float]]
"""Each model with the fraction of the prompts that it responds to, or whose responses it reads."""
FORWARD_FLOPS, FULL_TRAINING_FLOPS, LORA_TRAINING_FLOPS, CHECKPOINTING_FLOPS = 2, 6, 4, 2
"""Operations per weight and token; gradient checkpointing repeats the forward pass."""
TOKEN_BYTES = 8
"""Of a token in rollouts and results, as id and as text; an upper bound in practice."""
MAX_SAVED_STEPS = 3
"""Two saved steps, and the next one before the oldest is removed."""
VLLM_RESPONSES = 256
"""Responses that vLLM samples together."""
VLLM_MEMORY_FRACTION = 0.9
"""Of the GPU's memory that `tsdkd eval` gives to vLLM."""


@dataclass(frozen=True)
class Estimate:
    """Cost of one stage."""

    work: str
    """Responses, tokens, steps or documents."""
    seconds: float
    disk: int
    """Bytes of the artifact."""
    memory: int
    """Peak bytes."""
    temporary_disk: int = 0
    """Further bytes on disk while the stage runs."""
    is_upper_bound: bool = False


def estimate_generate(models: ModelFractions, workload: Workload, config: GenerateConfig, rates: Rates) -> Estimate:
    """Each model responds to its fraction of the prompts, one model after the other.

    With a token-by-token policy, the student, whose fraction is 1, and one teacher at a time are loaded.
    """
    batch = VLLM_RESPONSES if config.engine == "vllm" else config.batch_size
    gpus = config.tensor_parallel * (config.data_parallel or 1)
    seconds = sum(
        _sampling_seconds(model, config.dtype, workload, fraction, batch, rates) / gpus for model, fraction in models
    )
    needs = [
        model.weight_bytes(config.dtype) + batch * model.sequence_bytes(config.dtype, workload.max_tokens, 1)
        for model, _ in models
    ]
    together = AUTHORS[config.policy][0] in JOINT_AUTHORS
    memory = needs[0] + max(needs[1:]) if together else max(needs)
    if config.engine == "vllm":
        fraction = MEMORY_FRACTION if config.memory_fraction is None else config.memory_fraction
        memory = int(fraction * total_memory(rates.device))
    work = f"{_bound_sign(workload)}{workload.count:,} x {workload.response_tokens:,.0f} tokens"
    disk = round(TOKEN_BYTES * workload.total_tokens)
    return Estimate(work, seconds, disk, memory, is_upper_bound=workload.is_upper_bound)


def estimate_score(
    student: PlannedModel, teachers: ModelFractions, workload: Workload, config: ScoreConfig, rates: Rates
) -> Estimate:
    """The student reads every response, each teacher its own; one teacher is loaded at a time."""
    written = sum(
        score_cost(config, teacher.head(config.dtype), round(fraction * workload.total_response_tokens)).bytes
        for teacher, fraction in teachers
    )
    sequences = max(1, config.batch_tokens / workload.max_tokens)
    models = [student, *(teacher for teacher, _ in teachers)]
    memory = student.weight_bytes(config.dtype) + max(model.weight_bytes(config.dtype) for model in models[1:])
    memory += int(sequences * max(model.sequence_bytes(config.dtype, workload.max_tokens, 0) for model in models))
    memory += 8 * CHUNK_BYTES[rates.device] + 2 * min(BLOCK_BYTES, written)
    weights = student.size.matmul_parameters + sum(
        share * teacher.size.matmul_parameters for teacher, share in teachers
    )
    flops = FORWARD_FLOPS * weights * workload.total_tokens
    work = f"{_bound_sign(workload)}{workload.total_tokens:,.0f} tokens"
    return Estimate(work, rates.seconds(flops), written, memory, is_upper_bound=workload.is_upper_bound)


def estimate_train(
    student: PlannedModel,
    teachers: ModelFractions,
    workload: Workload,
    config: TrainConfig,
    precision: str,
    rates: Rates,
) -> Estimate:
    """teachers: empty for a method without a teacher signal. workload: online, with responses of the largest length."""
    held_out = round(config.held_out * workload.count)
    trained = workload.count - held_out
    steps = ceil(config.epochs * ceil(trained / config.batch_size))
    seconds = rates.seconds(_training_flops(student, teachers, workload, config) * trained * config.epochs)
    if config.online and teachers:
        seconds += _online_sampling_seconds(student, teachers, workload, trained, config, precision, rates)
    if config.eval_steps:
        tokens = workload.prompt_tokens + workload.response_tokens
        measurement = rates.seconds(FORWARD_FLOPS * student.size.matmul_parameters * tokens * held_out)
        seconds += steps // config.eval_steps * measurement
    parameters = student.size.parameters
    trained_weights = config.lora.rank * student.size.lora_parameters if config.lora else parameters
    width = 2 if precision == "bfloat16" else FLOAT32_BYTES
    disk = trained_weights * FLOAT32_BYTES if config.lora and not config.lora.merge else parameters * width
    saved_steps = min(MAX_SAVED_STEPS, ceil(steps / (config.eval_steps or config.save_steps)))
    temporary_disk = saved_steps * (FLOAT32_BYTES * trained_weights + optimizer_bytes(student.size, config))
    configs = [teacher.config for teacher, _ in teachers]
    memory = estimate_training_memory(student.config, configs, workload.max_tokens, config, precision).total
    work = f"{steps:,} steps of {config.batch_size}"
    return Estimate(work, seconds, disk, memory, temporary_disk, workload.is_upper_bound)


def estimate_eval(
    models: Sequence[PlannedModel], held_out: Workload | None, config: EvalConfig, rates: Rates
) -> Estimate:
    seconds, disk, memory, documents, generates = 0.0, 0, 0, 0, False
    for name in config.tasks:
        benchmark = BENCHMARKS[name]
        new_tokens = benchmark.response_limit(config.max_new_tokens)
        count, prompt_tokens = benchmark_length(benchmark)
        count = min(count, config.limit or count)
        documents, generates = documents + count, generates or new_tokens > 0
        count *= benchmark.choose_sampling(config).samples
        max_tokens = prompt_tokens + new_tokens
        workload = Workload(count, prompt_tokens, new_tokens, max_tokens, is_upper_bound=new_tokens > 0)
        disk += round(TOKEN_BYTES * workload.total_tokens) * len(models)
        for model in models:
            weights = model.weight_bytes(config.dtype)
            sequence = model.sequence_bytes(config.dtype, max_tokens, 1 if new_tokens else prompt_tokens)
            batch = config.batch_size or fitting_batch_size(sequence, weights, rates.device)
            responses = VLLM_RESPONSES if config.engine == "vllm" else batch
            sampling = _sampling_seconds(model, config.dtype, workload, 1, responses, rates)
            seconds += sampling / config.tensor_parallel
            memory = max(memory, weights + batch * sequence)
    if held_out:
        matmul_parameters = sum(model.size.matmul_parameters for model in models)
        seconds += rates.seconds(FORWARD_FLOPS * held_out.total_tokens * matmul_parameters)
    if config.engine == "vllm":
        memory = int(VLLM_MEMORY_FRACTION * total_memory(rates.device))
    work = f"{len(models)} x {documents:,} documents"
    return Estimate(work, seconds, disk, memory, is_upper_bound=generates)


def sum_estimates(estimates: Sequence[Estimate]) -> Estimate:
    """The cost of consecutive stages, with peak disk and peak memory."""
    disk_after = accumulate(estimate.disk for estimate in estimates)
    pairs = zip(disk_after, estimates, strict=True)
    disk = max((after + estimate.temporary_disk for after, estimate in pairs), default=0)
    memory = max((estimate.memory for estimate in estimates), default=0)
    seconds = sum(estimate.seconds for estimate in estimates)
    return Estimate("", seconds, disk, memory, is_upper_bound=any(estimate.is_upper_bound for estimate in estimates))


def _bound_sign(workload: Workload) -> str:
    return "≤ " if workload.is_upper_bound else ""


def _training_flops(student: PlannedModel, teachers: ModelFractions, workload: Workload, config: TrainConfig) -> float:
    """Operations per prompt with its response, without sampling."""
    tokens = workload.prompt_tokens + workload.response_tokens
    per_weight = LORA_TRAINING_FLOPS if config.lora else FULL_TRAINING_FLOPS
    per_weight += CHECKPOINTING_FLOPS * config.gradient_checkpointing
    readings = 2 if find_method(config.method).reads_twice else 1
    per_weight += FORWARD_FLOPS * (readings - 1)
    flops = per_weight * student.size.matmul_parameters * tokens
    for teacher, fraction in teachers:
        if config.online:
            forwards = readings if len(teachers) == 1 else 1  # several keep what they read of a step
            flops += forwards * fraction * FORWARD_FLOPS * teacher.size.matmul_parameters * tokens
        else:
            head = teacher.head("auto").weight.numel()
            flops += readings * fraction * FORWARD_FLOPS * head * workload.response_tokens
    return flops


def _online_sampling_seconds(
    student: PlannedModel,
    teachers: ModelFractions,
    workload: Workload,
    trained: int,
    config: TrainConfig,
    precision: str,
    rates: Rates,
) -> float:
    assert config.online is not None
    fraction = 1.0 if config.online.replay else config.online.student_fraction
    dtype: DType = "bfloat16" if precision == "bfloat16" else "float32"
    batch = min(config.online.sampling.batch_size, config.batch_size)
    sampled = Workload(
        round(trained * config.epochs),
        workload.prompt_tokens,
        workload.response_tokens,
        workload.max_tokens,
        is_upper_bound=True,
    )
    models = [student, *(teacher for teacher, _ in teachers if config.online.teacher_fraction)]
    return sum(_sampling_seconds(model, dtype, sampled, fraction, batch, rates) for model in models)


def _sampling_seconds(
    model: PlannedModel, dtype: DType, workload: Workload, fraction: float, batch: int, rates: Rates
) -> float:
    """Seconds to read a fraction of the prompts and to sample their responses, `batch` at a time."""
    count = ceil(fraction * workload.count)
    batch = min(batch, count)
    flops = FORWARD_FLOPS * model.size.matmul_parameters
    cached_tokens = workload.prompt_tokens + workload.response_tokens / 2
    moved_bytes = model.bytes_per_step(dtype, batch, cached_tokens)
    steps = ceil(count / max(1, batch)) * workload.response_tokens
    return rates.seconds(flops * count * workload.prompt_tokens) + steps * rates.seconds(flops * batch, moved_bytes)
