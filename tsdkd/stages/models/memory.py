"""How much memory training needs, from the models' configs, before a weight is loaded."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from tsdkd.core.chunked import CHUNK_BYTES, TEACHER_SHARE
from tsdkd.errors import InputError
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.models.device import auto_dtype, default_device
from tsdkd.stages.models.sizes import available_memory, model_size, total_memory

FLOAT32_BYTES = 4
"""Bytes of float32."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes."""

    state: int
    """Weights, gradients and AdamW's two moments: needed whatever the batch."""
    activations: int
    """Of one micro-batch, at its longest."""
    objective: int
    """Chunks of logits, of student and teacher."""
    teacher: int
    """Its head; all of it when it reads along, and vLLM's share where that answers."""
    available: int

    @property
    def total(self) -> int:
        return self.state + self.activations + self.objective + self.teacher

    def rows(self) -> list[tuple[str, str]]:
        named = {
            "weights, gradients, optimizer": self.state,
            "activations": self.activations,
            "objective": self.objective,
            "teacher": self.teacher,
            "in all": self.total,
            "available": self.available,
        }
        return [(name, f"{size / 1e9:,.1f} GB") for name, size in named.items()]


def estimate_training_memory(
    student: PreTrainedConfig, teacher: PreTrainedConfig | None, longest: int, config: TrainConfig, precision: str
) -> TrainingMemory:
    """`teacher`: None where its answers are enough. `longest`: tokens of the longest sequence, prompt included."""
    narrow = 2 if precision == "bfloat16" else FLOAT32_BYTES
    size, device = model_size(student), default_device()
    parameters = size.parameters
    if config.lora:
        learned = config.lora.rank * size.ends  # two thin matrices per linear layer
        state = parameters * narrow + learned * 4 * FLOAT32_BYTES
    else:
        state = parameters * (
            4 * FLOAT32_BYTES + (narrow if narrow < FLOAT32_BYTES else 0)
        )  # autocast keeps a rounded copy
    return TrainingMemory(
        state=state,
        activations=_activations(student, longest, config, narrow),
        objective=CHUNK_BYTES[device] * (TEACHER_SHARE + 1) // TEACHER_SHARE,
        teacher=_teacher(teacher, config) if teacher else 0,
        available=available_memory(device),
    )


def require_memory(found: TrainingMemory, config: TrainConfig) -> str | None:
    """Advice when it may not fit. Raises InputError when weights and optimizer alone do not."""
    advice = ["a smaller --micro-batch-size", "--gradient-checkpointing"]
    if config.lora is None:
        advice.insert(0, "--lora")
    if found.state + found.teacher > found.available:
        raise InputError(
            f"Training needs {(found.state + found.teacher) / 1e9:.1f} GB for weights and optimizer alone; "
            f"{found.available / 1e9:.1f} GB are available.",
            "Give --lora, free memory, or train a smaller student." if config.lora is None else "Free memory.",
        )
    if found.total > found.available:
        return f"This may not fit ({found.total / 1e9:.1f} GB); what helps: {', '.join(advice)}."
    return None


def _teacher(teacher: PreTrainedConfig, config: TrainConfig) -> int:
    """Its head; of a live one all that is on the student's device, and vLLM's share where that answers."""
    online, device, shape = config.online, default_device(), teacher.get_text_config()
    if online is None:
        return int(shape.vocab_size * shape.hidden_size * 2)
    size = 0
    if device == "cpu" or online.teacher_device in {None, device}:
        wanted = online.teacher_dtype
        dtype = auto_dtype(teacher, device) if wanted == "auto" else wanted
        size += model_size(teacher).parameters * getattr(torch, dtype).itemsize
    if online.sampling.engine == "vllm":
        size += int(online.sampling.memory_fraction * total_memory(device))
    return size


def _activations(student: PreTrainedConfig, longest: int, config: TrainConfig, narrow: int) -> int:
    shape: PreTrainedConfig = student.get_text_config()
    tokens = config.micro_batch_size * longest
    layers, heads, width, inner = (
        int(getattr(shape, name))
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")
    )
    eager = config.attention == "eager" or (config.attention is None and default_device() == "cpu")
    # Around the matrix products in the forward's precision, norms and residuals in float32.
    layer = tokens * (narrow * (8 * width + 4 * inner) + FLOAT32_BYTES * 4 * width)
    layer += eager * tokens * longest * heads * (2 * FLOAT32_BYTES + narrow)
    if config.gradient_checkpointing:
        return layer + layers * tokens * width * FLOAT32_BYTES
    return layer * layers
