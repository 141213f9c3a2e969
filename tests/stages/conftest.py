"""Rollouts and scores that tests of training share."""

import json
from pathlib import Path

import pytest

from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.score.stage import score


@pytest.fixture(scope="session")
def run(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts and scores of ten responses."""
    directory = tmp_path_factory.mktemp("run")
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Count to {i}{'!' * (i % 3)}"}) + "\n" for i in range(10)))
    generate(prompts, str(student), directory / "rollouts", GenerateConfig(max_new_tokens=12, part_size=4))
    score(directory / "rollouts", str(student), str(teacher), directory / "scores", ScoreConfig(k=4))
    return directory
