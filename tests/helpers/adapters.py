"""LoRA adapters of tiny models."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def save_adapter(base: Path, path: Path, *, seed: int = 0, rank: int = 4) -> Path:
    """Saves an adapter that changes its base model's logits."""
    torch.manual_seed(seed)
    settings = LoraConfig(r=rank, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(path)
    return path
