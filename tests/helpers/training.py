"""Shared by tests of training: a small configuration, a run of it, and its results."""

import gc
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tsdkd.core import TSDKDConfig, tsdkd_loss
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.data.source import Sample
from tsdkd.stages.metrics.log import METRICS_FILE
from tsdkd.stages.models.load import load_model
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.train.stage import train_offline
from tsdkd.stages.train.trainer import DistillationTrainer

Weights = dict[str, torch.Tensor]
OBJECTIVE = TSDKDConfig(k=4)
CONFIG = TrainConfig(
    objective=OBJECTIVE,
    learning_rate=1e-3,
    epochs=2,
    batch_size=4,
    micro_batch_size=2,
    precision="float32",
    save_steps=2,
)
SAMPLING = GenerateConfig(engine="transformers", max_new_tokens=12)


class RecordingObserver(SilentObserver):
    """Keeps messages and warnings."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.warnings: list[str] = []

    def info(self, message: str) -> None:
        self.messages.append(message)

    def warning(self, message: str) -> None:
        self.warnings.append(message)


def learn(run: Path, student: Path, output: Path, config: TrainConfig = CONFIG, **more: object) -> Weights:
    train_offline(run / "rollouts", run / "scores", str(student), output, config, **more)
    return weights(output)


def cut(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException | None = None) -> None:
    """Make training fail in a step (the first is 0), with a RuntimeError "cut" by default."""
    compute_loss = DistillationTrainer.compute_loss

    def cut_or_compute(self: DistillationTrainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step == step:
            raise error or RuntimeError("cut")
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", cut_or_compute)


def weights(path: Path) -> Weights:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def metrics(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / METRICS_FILE).read_text().splitlines()]


def same_update(one: Weights, other: Weights, start: Weights) -> bool:
    """Whether both move the weights alike, as one vector: AdamW magnifies the rounding of tiny gradients."""
    return distance(one, other) < 1e-3 * distance(one, start)


def distance(one: Weights, other: Weights) -> float:
    """The Euclidean distance of all weights, as one vector."""
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5


def largest_change(one: Weights, other: Weights) -> float:
    """The largest absolute difference of a weight."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def loss_of_two_models(rows: list[Sample], student: Path, teacher: Path) -> tuple[torch.Tensor, Weights]:
    """The objective of all responses at once, from padded full logits of both models."""
    logits, mask = logits_of_two_models(rows, student, teacher)
    return tsdkd_loss(*logits, mask, OBJECTIVE)


def logits_of_two_models(rows: list[Sample], student: Path, teacher: Path) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Both models' logits (response, token, vocab) that predict the responses' tokens, and the mask of these tokens."""
    longest = max(len(row["response_ids"]) for row in rows)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    logits = []
    for name in (student, teacher):
        reader = load_model(str(name))
        grid = torch.zeros(len(rows), longest, len(reader.tokenizer))
        for i, row in enumerate(rows):
            with torch.no_grad():
                found = reader.model(torch.tensor([row["prompt_ids"] + row["response_ids"]])).logits[0]
            start, length = len(row["prompt_ids"]) - 1, len(row["response_ids"])
            grid[i, :length] = found[start : start + length, : grid.shape[-1]]
            mask[i, :length] = True
        logits.append(grid)
    return logits, mask


def live_parameters() -> list[torch.nn.Parameter]:
    """All parameters in this process."""
    return [found for found in gc.get_objects() if issubclass(type(found), torch.nn.Parameter)]
