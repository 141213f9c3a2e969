"""Several processes train what one trains: weights, log and adaptive openers, to float32 rounding."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import write_prompts
from tsdkd.stages.config import GenerateConfig, ScoreConfig
from tsdkd.stages.generate import generate
from tsdkd.stages.score import score

ONE = [sys.executable, "-m", "tsdkd"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tsdkd"]


@pytest.fixture(scope="module")
def run(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven responses: in batches of four, the last batch leaves one process with less than the other."""
    place = tmp_path_factory.mktemp("run")
    prompts = write_prompts(place / "prompts.jsonl", 11)
    generate(prompts, str(student), place / "rollouts", GenerateConfig(max_new_tokens=12))
    score(place / "rollouts", str(student), str(teacher), place / "scores", ScoreConfig(k=4))
    return place


def learn(
    run: Path, launcher: list[str], output: Path, *options: object
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    command = [*launcher, "train", "--checkpoint", output, "--k", 4, "--precision", "fp32"]
    command += ["--learning-rate", 1e-3, "--epochs", 2, "--batch-size", 4, *options]
    # torchrun takes `--run` for an abbreviation of its own options
    named = {"TSDKD_RUN": str(run), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment = os.environ | named
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: tsdkd eval") == 1  # the first process alone speaks
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return AutoModelForCausalLM.from_pretrained(output).state_dict(), log


@pytest.mark.parametrize(
    ("micro", "opener"),
    [(2, "adaptive"), (1, "0.1")],
)
def test_two_processes_are_one(run: Path, student: Path, tmp_path: Path, micro: int, opener: str) -> None:
    expected, expected_log = learn(run, ONE, tmp_path / "one", "--micro-batch-size", 4, "--opener", opener)
    found, log = learn(run, TWO, tmp_path / "two", "--micro-batch-size", micro, "--opener", opener)
    start = AutoModelForCausalLM.from_pretrained(student).state_dict()

    def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        return math.sqrt(sum(float((one[key] - other[key]).square().sum()) for key in one))

    assert apart(found, expected) < 1e-3 * apart(start, expected)
    for mine, other in zip(log, expected_log, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)
