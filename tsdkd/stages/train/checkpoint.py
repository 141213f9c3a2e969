"""The files of a trained model, which transformers, peft and vLLM load as they are."""

from pathlib import Path
from typing import Any

import torch

from tsdkd.artifacts.manifest import Manifest
from tsdkd.stages.config.train import LoRAConfig
from tsdkd.stages.methods import Method
from tsdkd.stages.methods.origin import METHOD_FILE
from tsdkd.stages.metrics.log import METRICS_FILE, is_evaluation, is_step, log_line
from tsdkd.stages.models.distributed import unsharded
from tsdkd.stages.models.merged_weights import merged_weights
from tsdkd.stages.models.new_adapters import save_adapter
from tsdkd.stages.models.paths import model_directory
from tsdkd.stages.models.save import save_end_ids, save_model
from tsdkd.stages.train.model_card import model_card
from tsdkd.stages.train.trainer import DistillationTrainer


def save_checkpoint(
    trainer: DistillationTrainer,
    lora: LoRAConfig | None,
    method: Method,
    manifest: Manifest,
    directory: Path,
    dtype: torch.dtype,
) -> None:
    """Write weights (or an adapter), tokenizer, metrics, model card and the file of a user's method.

    Every rank must call it; rank 0 writes.

    Full weights are saved in the precision of the forward pass (`dtype`). The float32 weights behind a bfloat16 forward
    hold updates that are too small for it; used in float32, all of them would take effect together, in a model that no
    step has evaluated.
    """
    trained: Any = unsharded(trainer.student).model if lora else trainer.student.model
    weights = None if lora else trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        return
    vars(trained).pop("forward", None)  # the trainer's, which returns the loss
    if lora and lora.merge:
        merges_bits = lora.quantize is not None  # peft would round the merged weights to bits again
        weights = merged_weights(trained.get_base_model()) if merges_bits else trained.merge_and_unload().state_dict()
    if weights is None:
        save_adapter(trained, trainer.student, directory)
    else:
        save_model(trainer.untrained_config, weights, dtype, model_directory(trainer.student.name), directory)
    save_end_ids(trainer.student, model_directory(trainer.student.name), directory)
    trainer.student.tokenizer.save_pretrained(directory)
    entries = trainer.state.log_history
    steps, evaluations = list(filter(is_step, entries)), list(filter(is_evaluation, entries))
    lines = [log_line(entry) for entry in entries if is_step(entry) or is_evaluation(entry)]
    (directory / METRICS_FILE).write_text("".join(lines))
    (directory / "README.md").write_text(model_card(manifest, method, steps, evaluations))
    if method.origin and method.origin.content is not None:
        (directory / METHOD_FILE).write_bytes(method.origin.content)
