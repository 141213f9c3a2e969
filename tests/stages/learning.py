"""What tests of training share: a small configuration, a run of it, and what came out."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tsdkd.core import TSDKDConfig
from tsdkd.stages.config import TrainConfig
from tsdkd.stages.train import train
from tsdkd.stages.training.checkpoint import METRICS_FILE

Weights = dict[str, torch.Tensor]
OBJECTIVE = TSDKDConfig(k=4)
CONFIG = TrainConfig(
    objective=OBJECTIVE, learning_rate=1e-3, epochs=2, batch_size=4, micro_batch_size=2, precision="fp32", save_steps=2
)


def learn(run: Path, student: Path, output: Path, config: TrainConfig = CONFIG, **more: object) -> Weights:
    train(run / "rollouts", run / "scores", str(student), output, config, **more)
    return weights(output)


def weights(path: Path) -> Weights:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def metrics(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / METRICS_FILE).read_text().splitlines()]


def same_update(one: Weights, other: Weights, start: Weights) -> bool:
    """Do both move the weights alike? AdamW blows up the rounding of tiny gradients, so all are taken together."""
    return distance(one, other) < 1e-3 * distance(one, start)


def distance(one: Weights, other: Weights) -> float:
    """Euclidean."""
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5


def apart(one: Weights, other: Weights) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)
