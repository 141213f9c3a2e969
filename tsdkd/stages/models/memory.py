"""An estimate of the memory that training needs, counted on the models without weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from tsdkd.core.chunk_sizes import CHUNK_BYTES, TEACHER_CHUNKS
from tsdkd.errors import InputError
from tsdkd.processes import shards_weights
from tsdkd.stages.config.optimizer import FLOAT32_BYTES, OPTIMIZERS, state_bytes
from tsdkd.stages.config.train import MICRO_BATCH_SIZE, TrainConfig
from tsdkd.stages.config.types import QuantizedBits
from tsdkd.stages.models.device import auto_dtype, available_memory, default_device, total_memory
from tsdkd.stages.models.model_size import ModelSize, head_shape, model_size, parameter_count
from tsdkd.stages.models.quantized import quantized_bytes


@dataclass(frozen=True)
class TrainingMemory:
    """In bytes."""

    weights: int
    """Weights and gradients: independent of the batch."""
    optimizer: int
    """The optimizer's states."""
    activations: int
    """One micro-batch: of the longest sequences, or of as many tokens as are packed."""
    objective: int
    """One chunk of the student's and the teacher's logits."""
    teacher: int
    """Offline, the heads of all teachers; online, one whole teacher and vLLM, if they are on the student's device."""
    available: int
    paged: bool = False
    """The optimizer's states leave the device when its memory is short."""

    @property
    def fixed(self) -> int:
        """The bytes that training needs for any batch."""
        return self.weights + self.teacher + (0 if self.paged else self.optimizer)

    @property
    def total(self) -> int:
        return self.fixed + self.activations + self.objective

    def rows(self) -> list[tuple[str, str]]:
        """Labels and sizes of a table."""
        sizes = {
            "weights, gradients": self.weights,
            f"optimizer{' (paged, not in the total)' if self.paged else ''}": self.optimizer,
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
        frozen = _frozen_bytes(size, config.quantize, itemsize)
        weights = frozen + config.lora.rank * size.lora_parameters * 2 * FLOAT32_BYTES
    else:
        autocast_copy = itemsize if itemsize < FLOAT32_BYTES else 0
        weights = size.parameters * (2 * FLOAT32_BYTES + autocast_copy)
    return TrainingMemory(
        weights=weights,
        optimizer=optimizer_bytes(size, config),
        paged=OPTIMIZERS[config.optimizer].paged,
        activations=_activation_bytes(size, longest, config, itemsize),
        objective=CHUNK_BYTES[device] * (TEACHER_CHUNKS + 1) // TEACHER_CHUNKS,
        teacher=_teacher_bytes(teachers, config),
        available=available_memory(device),
    )


def require_memory(memory: TrainingMemory, config: TrainConfig) -> str | None:
    """Returns a warning if training may not fit. Raises InputError if weights and optimizer alone do not fit."""
    if memory.fixed > memory.available:
        with_vllm = config.online is not None and config.online.vllm_shares_devices
        remedies = ["give --lora, train a smaller student"] if config.lora is None else []
        remedies += [f"give {option}" for option in _leaner_states(config)]
        remedies += ["lower --memory-fraction, which is vLLM's share"] if with_vllm else []
        raise InputError(
            f"Training needs {memory.fixed / 1e9:.1f} GB for weights and optimizer{' and vLLM' if with_vllm else ''} "
            f"alone; {memory.available / 1e9:.1f} GB are available.",
            ", or ".join(["Free memory", *remedies]) + ".",
        )
    if memory.total > memory.available:
        options = ["--lora"] if config.lora is None else []
        limit = "--micro-batch-tokens" if config.micro_batch_tokens else "--micro-batch-size"
        options += [*_leaner_states(config), f"a smaller {limit}", "--gradient-checkpointing"]
        return f"This may not fit ({memory.total / 1e9:.1f} GB). Options that save memory: {', '.join(options)}."
    return None


def _leaner_states(config: TrainConfig) -> list[str]:
    """The option that makes weights or the optimizer's states smaller; states of adapters are small already."""
    if shards_weights():
        return []
    if config.lora:
        return [] if config.quantize else ["--quantize 4bit"]
    return ["--optimizer adamw_8bit"] if config.optimizer in {"adamw_torch", "adamw_torch_fused"} else []


def optimizer_bytes(size: ModelSize, config: TrainConfig) -> int:
    """Bytes of the optimizer's states of all trained weights."""
    if config.lora:
        rank = config.lora.rank
        adapters = [shape for rows, columns in size.adapted_shapes for shape in ((rows, rank), (rank, columns))]
        return sum(state_bytes(config.optimizer, shape) for shape in adapters)
    return sum(state_bytes(config.optimizer, shape, embedding=looked_up) for shape, looked_up in size.weight_shapes)


def _frozen_bytes(size: ModelSize, quantize: QuantizedBits | None, itemsize: int) -> int:
    """Bytes of the weights below adapters."""
    shapes = size.quantized_shapes if quantize else ()
    full = size.parameters - sum(rows * columns for rows, columns in shapes)
    return full * itemsize + sum(quantized_bytes(quantize, *shape) for shape in shapes if quantize)


def _teacher_bytes(teachers: Sequence[PreTrainedConfig], config: TrainConfig) -> int:
    online, device = config.online, default_device()
    if online is None:
        return sum(vocab * width * 2 for vocab, width in map(head_shape, teachers))
    size = 0
    if device == "cpu" or online.teacher_device in {None, device}:
        size = max((_loaded_bytes(teacher, online.teacher_dtype, device) for teacher in teachers), default=0)
    if online.vllm_shares_devices:
        size += int(online.memory_fraction * total_memory(device))
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
