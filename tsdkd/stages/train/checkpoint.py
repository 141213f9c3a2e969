"""The files of a trained model, which transformers, peft and vLLM load without us."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tsdkd.artifacts.manifest import Manifest
from tsdkd.stages.config.train import LoRAConfig
from tsdkd.stages.models.distributed import unsharded
from tsdkd.stages.train.model_card import model_card
from tsdkd.stages.train.trainer import DistillationTrainer

METRICS_FILE = "metrics.jsonl"


def save_checkpoint(
    trainer: DistillationTrainer, lora: LoRAConfig | None, manifest: Manifest, directory: Path, dtype: torch.dtype
) -> None:
    """Weights (or an adapter), tokenizer, metrics and model card; every process must call it, the first one writes.

    Full weights are saved in the precision of the forward that was trained. The float32 weights behind a bf16 forward
    hold updates too small for it to see; used in float32 they would all take effect at once, as a model that no step
    has looked at.
    """
    trained: Any = unsharded(trainer.student).model if lora else trainer.student.model
    weights = None if lora else trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        return
    vars(trained).pop("forward", None)  # the objective's
    if weights is not None:
        _with_weights(trained, weights, dtype).save_pretrained(directory)
    elif lora and lora.merge:
        trained.merge_and_unload().to(dtype).save_pretrained(directory)
    else:
        trained.save_pretrained(directory)
    trainer.student.tokenizer.save_pretrained(directory)
    lines = [json.dumps(entry, sort_keys=True) + "\n" for entry in trainer.log_entries]
    (directory / METRICS_FILE).write_text("".join(lines))
    (directory / "README.md").write_text(model_card(manifest, trainer.logged_steps, trainer.logged_evaluations))


def _with_weights(trained: PreTrainedModel, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(trained.config, dtype=dtype)
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    model.tie_weights()
    model.generation_config = trained.generation_config
    return model
