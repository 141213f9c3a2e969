"""What one stage will take, in bytes and seconds: arithmetic on shapes, tokens and two rates.

A token costs a forward two operations a weight that it is multiplied with, training two or four more backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil

from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.config.types import DType
from tsdkd.stages.data.score_cost import BLOCK_BYTES, score_cost
from tsdkd.stages.data.scoring import CHUNK_BYTES
from tsdkd.stages.models.device import total_memory
from tsdkd.stages.models.memory import FLOAT32_BYTES
from tsdkd.stages.models.memory import estimate_training_memory as memory_of_training
from tsdkd.stages.models.sizes import fitting_batch_size
from tsdkd.stages.plan.benchmark_lengths import benchmark_length
from tsdkd.stages.plan.chain import Workload
from tsdkd.stages.plan.models import PlannedModel
from tsdkd.stages.plan.rates import Rates
from tsdkd.stages.results.benchmarks import BENCHMARKS

FORWARD, FULL, ADAPTERS, AGAIN = 2, 6, 4, 2
"""Operations a weight and token: reading; training every weight, or adapters; reading again for the activations."""
TEXT_BYTES = 8
"""Of a token in rollouts and results, as id and as text: more than it was ever seen to be."""
RESUME_BYTES = 12
"""Of a weight that learns, in a saved step: itself and AdamW's two moments, in float32."""
KEPT_STEPS = 3
"""Saved steps at most: two, and the next one before the oldest goes."""
AT_ONCE = 256
"""Responses that vLLM samples together."""
VLLM_SHARE = 0.9
"""Of the GPU's memory, where eval asks vLLM."""


@dataclass(frozen=True)
class Estimate:
    amount: str
    """Responses, tokens or steps."""
    seconds: float
    disk: int
    memory: int
    """At its peak."""
    aside: int = 0
    """More bytes on disk while it runs."""
    at_most: bool = False


def generate(
    models: Sequence[PlannedModel], shares: Sequence[float], texts: Workload, config: GenerateConfig, rates: Rates
) -> Estimate:
    """`models` answer `shares` of the texts; in a policy token by token both answer all."""
    together = AT_ONCE if config.engine == "vllm" else config.batch_size
    copies = config.tensor_parallel * config.data_parallel
    seconds = sum(
        _answering(model, config.dtype, texts, share, together, rates) / copies
        for model, share in zip(models, shares, strict=True)
    )
    needs = [
        model.weights(config.dtype) + together * model.sequence(config.dtype, texts.longest, 1) for model in models
    ]
    peak = sum(needs) if sum(shares) > 1 else max(needs)
    if config.engine == "vllm":
        peak = int(config.memory_fraction * total_memory(rates.device))
    amount = f"{_most(texts)}{texts.count:,} x {texts.response:,.0f} tokens"
    return Estimate(amount, seconds, round(TEXT_BYTES * texts.tokens), peak, at_most=texts.at_most)


def score(student: PlannedModel, teacher: PlannedModel, texts: Workload, config: ScoreConfig, rates: Rates) -> Estimate:
    written = score_cost(config, teacher.head(config.dtype), texts.response_tokens)
    batch = max(1, config.batch_tokens // texts.longest)
    peak = sum(model.weights(config.dtype) for model in (student, teacher))
    peak += batch * max(model.sequence(config.dtype, texts.longest, 0) for model in (student, teacher))
    peak += 8 * CHUNK_BYTES[rates.device] + 2 * min(BLOCK_BYTES, written.bytes)
    flops = FORWARD * (student.size.matmul_parameters + teacher.size.matmul_parameters) * texts.tokens
    amount = f"{_most(texts)}{texts.tokens:,.0f} tokens"
    return Estimate(amount, rates.seconds(flops), written.bytes, peak, at_most=texts.at_most)


def train(
    student: PlannedModel,
    teacher: PlannedModel | None,
    texts: Workload,
    config: TrainConfig,
    precision: str,
    rates: Rates,
) -> Estimate:
    """`teacher`: None where its answers are enough. `texts`: with fresh answers at their longest."""
    held = round(config.held_out * texts.count)
    learned = texts.count - held
    steps = ceil(config.epochs * ceil(learned / config.batch_size))
    tokens = texts.prompt + texts.response
    operations = (ADAPTERS if config.lora else FULL) + AGAIN * config.gradient_checkpointing
    flops = operations * student.size.matmul_parameters * tokens
    seconds = 0.0
    if config.online and teacher:
        flops += FORWARD * teacher.size.matmul_parameters * tokens
        share = 1.0 if config.online.replay else config.online.student_fraction
        fresh = Workload(round(learned * config.epochs), texts.prompt, texts.response, texts.longest, at_most=True)
        dtype: DType = "bfloat16" if precision == "bfloat16" else "float32"
        at_once = min(config.online.sampling.batch_size, config.batch_size)
        for model in (student, teacher) if config.online.teacher_fraction else (student,):
            seconds += _answering(model, dtype, fresh, share, at_once, rates)
    elif teacher:
        flops += FORWARD * teacher.head("auto").weight.numel() * texts.response
    seconds += rates.seconds(flops * learned * config.epochs)
    if config.eval_steps:
        seconds += steps // config.eval_steps * rates.seconds(FORWARD * student.size.matmul_parameters * tokens * held)
    width = 2 if precision == "bfloat16" else FLOAT32_BYTES
    parameters = student.size.parameters
    learning = config.lora.rank * student.size.lora_parameters if config.lora else parameters
    kept = learning * FLOAT32_BYTES if config.lora and not config.lora.merge else parameters * width
    saves = min(KEPT_STEPS, ceil(steps / (config.eval_steps or config.save_steps)))
    peak = memory_of_training(
        student.config, teacher.config if teacher else None, texts.longest, config, precision
    ).total
    amount = f"{steps:,} steps of {config.batch_size}"
    return Estimate(amount, seconds, kept, peak, saves * RESUME_BYTES * learning, texts.at_most)


def evaluate(models: Sequence[PlannedModel], held_out: Workload | None, config: EvalConfig, rates: Rates) -> Estimate:
    seconds, disk, peak, documents, generated = 0.0, 0, 0, 0, False
    for name in config.tasks:
        benchmark = BENCHMARKS[name]
        new = min(benchmark.max_new_tokens or 0, config.max_new_tokens or 2**31)
        count, prompt = benchmark_length(benchmark)
        count = min(count, config.limit or count)
        asked = Workload(count, prompt, new, prompt + new, at_most=new > 0)
        documents, generated = documents + count, generated or new > 0
        disk += round(TEXT_BYTES * asked.tokens) * len(models)
        for model in models:
            weights = model.weights(config.dtype)
            one = model.sequence(config.dtype, asked.longest, 1 if new else prompt)
            batch = config.batch_size or fitting_batch_size(one, weights, rates.device)
            together = AT_ONCE if config.engine == "vllm" else batch
            seconds += _answering(model, config.dtype, asked, 1, together, rates) / config.tensor_parallel
            peak = max(peak, weights + batch * one)
    if held_out:
        seconds += rates.seconds(FORWARD * held_out.tokens * sum(model.size.matmul_parameters for model in models))
    if config.engine == "vllm":
        peak = int(VLLM_SHARE * total_memory(rates.device))
    amount = f"{len(models)} x {documents:,} documents"
    return Estimate(amount, seconds, disk, peak, at_most=generated)


def total(found: Sequence[Estimate]) -> Estimate:
    """Of stages one after the other: disk when it is fullest."""
    kept = accumulate(one.disk for one in found)
    disk = max((before + one.aside for before, one in zip(kept, found, strict=True)), default=0)
    memory = max((one.memory for one in found), default=0)
    return Estimate("", sum(one.seconds for one in found), disk, memory, at_most=any(one.at_most for one in found))


def _most(texts: Workload) -> str:
    return "≤ " if texts.at_most else ""


def _answering(model: PlannedModel, dtype: DType, texts: Workload, share: float, together: int, rates: Rates) -> float:
    """Seconds to read prompts and to answer them token by token, `together` at a time."""
    count = ceil(share * texts.count)
    together = min(together, count)
    flops = FORWARD * model.size.matmul_parameters
    cached = texts.prompt + texts.response / 2
    moved = model.read_each_step(dtype, together, cached)
    steps = ceil(count / max(1, together)) * texts.response
    return rates.seconds(flops * count * texts.prompt) + steps * rates.seconds(flops * together, moved)
