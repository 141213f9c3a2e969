"""A base student and an instruct teacher that end with other tokens, from prompts to results, as a user runs them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import run
from tests.helpers.models import copy_with_ends, save_tiny_model
from tests.helpers.prompts import write_prompts
from tsdkd.artifacts.reader import read_artifact
from tsdkd.stages.eval.lm_eval_transformers import TransformersModel

STUDENT_END, TEACHER_END = 258, 259


def test_the_checkpoint_stops_at_the_teachers_end_token(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it responds to prompts and to benchmarks; the student does not."""
    for name, seed, end in (("student", 2, STUDENT_END), ("teacher", 1, TEACHER_END)):
        model = save_tiny_model(tmp_path / f"{name}-model", seed=seed, extra=("<|text_end|>", "<|turn_end|>"))
        copy_with_ends(model, tmp_path / name, [end])
    student, teacher = ("--student", tmp_path / "student"), ("--teacher", tmp_path / "teacher")
    prompts, chain = write_prompts(tmp_path / "prompts.jsonl", 8), ("--run", tmp_path)
    run("generate", *student, *teacher, "--prompts", prompts, "--max-new-tokens", 8, *chain)
    run("score", *student, *teacher, "--k", 4, *chain)
    run("train", "--k", 4, "--epochs", 1, "--batch-size", 8, "--precision", "float32", *chain)
    generate, after_end = TransformersModel._model_generate, list[set[int]]()

    def spy(self: TransformersModel, context: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
        output = generate(self, context, *given, **more)
        for ids in output[:, context.shape[1] :].tolist():
            if TEACHER_END in ids:
                after_end.append({*ids[ids.index(TEACHER_END) + 1 :]})
        return output

    monkeypatch.setattr(TransformersModel, "_model_generate", spy)
    for name, stops in (("student", False), ("checkpoint", True)):
        model, output = tmp_path / name, tmp_path / f"by-{name}"
        run("generate", "--student", model, "--prompts", prompts, "--max-new-tokens", 100, "--rollouts", output)
        table = read_artifact(output, "rollouts").table().to_pylist()
        last = {row["response_ids"][-1] for row in table if row["finish_reason"] == "stop"}
        assert (TEACHER_END in last) == stops
        after_end.clear()
        words = ("--samples", 4, "--temperature", 1, "--max-new-tokens", 80, "--results", tmp_path / f"results-{name}")
        run("eval", "--model", f"m={model}", "--tasks", "aime24", "--data", rows, *words)
        assert after_end
        assert all(len(ids) <= 1 for ids in after_end) == stops  # padding alone
