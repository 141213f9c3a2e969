"""A Trainer that saves steps under the weight names of the model in memory, and checks the steps that it loads."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from tsdkd.errors import TsdkdError
from tsdkd.stages.models.adaptable import base_with_adapters
from tsdkd.stages.models.save import weights_only
from tsdkd.stages.train.resume import require_intact


class StepSavingTrainer(Trainer):
    """Saves and loads the steps of a run."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save a step under the weight names of the model in memory, which are the ones that Trainer reads back.

        Those of the hub differ for some models, for example where experts are fused.
        """
        directory = Path(str(output_dir or self.args.output_dir))
        options: dict[str, Any] = {} if hasattr(self.model, "peft_config") else {"save_original_format": False}
        with weights_only(base_with_adapters(self.model)):
            self.model.save_pretrained(directory, state_dict=state_dict, **options)
        if self.args.should_save:
            torch.save(self.args, directory / TRAINING_ARGS_NAME)

    def _load_best_model(self) -> None:
        """Load the best step. Raises TsdkdError if it is damaged: Trainer would keep the last weights."""
        require_intact(Path(str(self.state.best_model_checkpoint)))
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        known = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        if missing := set(load_result.missing_keys) - known:
            raise TsdkdError(
                f"The saved step has no values for {len(missing)} weights, such as {min(missing)}.",
                f"Remove {self.args.output_dir} to train again.",
            )
        super()._issue_warnings_after_load(load_result)

    def restore_step(self, step: Path) -> None:
        """Load weights and log of a saved step."""
        self._load_from_checkpoint(str(step))
        self.state = TrainerState.load_from_json(str(step / TRAINER_STATE_NAME))
