"""An estimate of the memory that training needs, counted on the models without weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from tsdkd.core.chunk_sizes import CHUNK_BYTES, TEACHER_CHUNKS
from tsdkd.errors import InputError
from tsdkd.stages.config.train import MICRO_BATCH_SIZE, TrainConfig
from tsdkd.stages.models.device import auto_dtype, available_memory, default_device, total_memory
from tsdkd.stages.models.model_size import ModelSize, head_shape, model_size, parameter_count

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class TrainingMemory:
    """In bytes."""

    state: int
    """Weights, gradients and AdamW's two moments: independent of the batch."""
    activations: int
    """One micro-batch: of the longest sequences, or of as many tokens as are packed."""
    objective: int
    """One chunk of the student's and the teacher's logits."""
    teacher: int
    """Offline, the heads of all teachers; online, one whole teacher and vLLM, if they are on the student's device."""
    available: int

    @property
    def total(self) -> int:
        return self.state + self.activations + self.objective + self.teacher

    def rows(self) -> list[tuple[str, str]]:
        """Labels and sizes of a table."""
        sizes = {
            "weights, gradients, optimizer": self.state,
            "activations": self.activations,
            "objective": self.objective,
            "teacher": self.teacher,
            "total": self.total,
            "available": self.available,
        }
        return [(label, f"{size / 1e9:,.1f} GB") for label, size in sizes.items()]


def estimate_training_memory(
    student: PreTrainedConfig, teachers: Sequence[PreTrainedConfig], longest: int, config: TrainConfig, precision: str
) -> TrainingMemory:
    """`teachers`: those whose weights are used; none for a served teacher, nor if its responses alone are learned.

    `longest`: tokens of the longest prompt with its response.
    """
    itemsize = 2 if precision == "bfloat16" else FLOAT32_BYTES
    size, device = model_size(student), default_device()
    if config.lora:
        trained = config.lora.rank * size.lora_parameters
        state = size.parameters * itemsize + trained * 4 * FLOAT32_BYTES
    else:
        autocast_copy = itemsize if itemsize < FLOAT32_BYTES else 0
        state = size.parameters * (4 * FLOAT32_BYTES + autocast_copy)
    return TrainingMemory(
        state=state,
        activations=_activation_bytes(size, longest, config, itemsize),
        objective=CHUNK_BYTES[device] * (TEACHER_CHUNKS + 1) // TEACHER_CHUNKS,
        teacher=_teacher_bytes(teachers, config),
        available=available_memory(device),
    )


def require_memory(memory: TrainingMemory, config: TrainConfig) -> str | None:
    """Returns a warning if training may not fit. Raises InputError if weights and optimizer alone do not fit."""
    fixed = memory.state + memory.teacher
    if fixed > memory.available:
        with_vllm = config.online is not None and config.online.sampling.engine == "vllm"
        remedies = ["give --lora, train a smaller student"] if config.lora is None else []
        remedies += ["lower --memory-fraction, which is vLLM's share"] if with_vllm else []
        raise InputError(
            f"Training needs {fixed / 1e9:.1f} GB for weights and optimizer{' and vLLM' if with_vllm else ''} alone; "
            f"{memory.available / 1e9:.1f} GB are available.",
            ", or ".join(["Free memory", *remedies]) + ".",
        )
    if memory.total > memory.available:
        options = ["--lora"] if config.lora is None else []
        limit = "--micro-batch-tokens" if config.micro_batch_tokens else "--micro-batch-size"
        options += [f"a smaller {limit}", "--gradient-checkpointing"]
        return f"This may not fit ({memory.total / 1e9:.1f} GB). Options that save memory: {', '.join(options)}."
    return None


def _teacher_bytes(teachers: Sequence[PreTrainedConfig], config: TrainConfig) -> int:
    online, device = config.online, default_device()
    if online is None:
        return sum(vocab * width * 2 for vocab, width in map(head_shape, teachers))
    size = 0
    if device == "cpu" or online.teacher_device in {None, device}:
        size = max((_loaded_bytes(teacher, online.teacher_dtype, device) for teacher in teachers), default=0)
    if online.sampling.engine == "vllm":
        size += int(online.sampling.memory_fraction * total_memory(device))
    return size


def _loaded_bytes(teacher: PreTrainedConfig, precision: str, device: str) -> int:
    dtype = auto_dtype(teacher, device) if precision == "auto" else precision
    return parameter_count(teacher) * int(getattr(torch, dtype).itemsize)


def _activation_bytes(student: ModelSize, longest: int, config: TrainConfig, itemsize: int) -> int:
    packed = config.micro_batch_tokens
    tokens = packed or (config.micro_batch_size or MICRO_BATCH_SIZE) * longest
    eager = config.attention == "eager" or (config.attention is None and default_device() == "cpu")
    eager = eager and not packed  # packed attention keeps no scores
    attention = eager * tokens * longest * student.attention_heads * (2 * FLOAT32_BYTES + itemsize)
    # Inputs and outputs of matrix products in the forward's precision; norms and residuals in float32.
    layers = [
        tokens * (itemsize * (8 * student.width + 4 * inner_width) + FLOAT32_BYTES * 4 * student.width)
        for inner_width in student.inner_widths
    ]
    if config.gradient_checkpointing:
        return max(layers, default=0) + attention + len(layers) * tokens * student.width * FLOAT32_BYTES
    return sum(layers) + student.attention_layers * attention
