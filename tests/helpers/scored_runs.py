"""Rollouts and scores of tiny models."""

import json
from pathlib import Path

from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.score.stage import score


def scored_run(directory: Path, student: Path, teacher: Path) -> Path:
    """Rollouts and scores of ten responses."""
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Count to {i}{'!' * (i % 3)}"}) + "\n" for i in range(10)))
    generate(prompts, str(student), directory / "rollouts", GenerateConfig(max_new_tokens=12, part_size=4))
    score(directory / "rollouts", str(student), str(teacher), directory / "scores", ScoreConfig(k=4))
    return directory
