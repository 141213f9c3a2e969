"""Rollouts and scores of tiny models."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc

from tsdkd.artifacts.reader import read_artifact
from tsdkd.artifacts.writer import Writer
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


FIELDS = ["math", "code", "math", "math", "code", "code", "math", "code", "code", "code"]
"""The teacher of each prompt; of three parts of four rows, the last has one teacher."""


def sampled_run(directory: Path, student: Path, teacher_by: str | None = "field") -> Path:
    """Rollouts of ten responses, whose prompts name two teachers in the column `field`, and in `source`."""
    rows = [
        {"prompt": f"Count to {i}{'!' * (i % 3)}", "field": field, "source": field} for i, field in enumerate(FIELDS)
    ]
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = GenerateConfig(max_new_tokens=12, part_size=4, teacher_by=teacher_by)
    generate(prompts, str(student), directory / "rollouts", config)
    return directory


def rollouts_of_one(rollouts: Path, teacher: str, output: Path) -> Path:
    """The rollouts whose prompts name one of the teachers; a part keeps its name."""
    whole = read_artifact(rollouts, "rollouts")
    manifest = replace(whole.manifest, parts=(), state="partial")
    with Writer.open(output, manifest) as writer:
        for part in whole.tables:
            table = whole.read_part(part).filter(pc.field("teacher") == teacher)
            if len(table):
                writer.write_table(part.file, table)
        writer.finish(whole.manifest.summary)
    return output
