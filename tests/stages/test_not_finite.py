"""Models with finite weights whose activations or logits overflow: no stage records NaN."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tsdkd.errors import NotFiniteError, TsdkdError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.prune import PruneConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.eval.stage import evaluate
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.load import load_model
from tsdkd.stages.prune import prune
from tsdkd.stages.score.stage import score


def scaled(model: Path, path: Path, part: str, factor: float) -> Path:
    """A copy of a model, with some of its weights multiplied."""
    shutil.copytree(model, path)
    weights = load_file(path / "model.safetensors")
    for name in weights:
        if part in name:
            weights[name] *= factor
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture
def large_logits(student: Path, tmp_path: Path) -> Path:
    path = scaled(student, tmp_path / "large", "lm_head", 30_000.0)
    assert all(weight.half().isfinite().all() for weight in load_file(path / "model.safetensors").values())
    return path


def test_activations_that_overflow_are_refused_on_loading(student: Path, tmp_path: Path) -> None:
    path = scaled(student, tmp_path / "large", "mlp", 1_000.0)
    assert torch.isfinite(load_model(str(path), "float32").model(torch.arange(5).unsqueeze(0)).logits).all()
    with pytest.raises(TsdkdError, match="computes NaN or infinite values in float16"):
        load_model(str(path), "float16")


def test_logits_that_overflow_end_the_stage(
    large_logits: Path, student: Path, prompts: Path, rows: Path, tmp_path: Path
) -> None:
    run, model = tmp_path / "run", str(large_logits)
    generate(prompts, str(student), run / "rollouts", GenerateConfig(max_new_tokens=3, limit=2))
    score(run / "rollouts", str(student), str(student), run / "scores", ScoreConfig(k=4))
    stages: list[Callable[[], object]] = [
        *(
            lambda t=t: generate(
                prompts,
                model,
                tmp_path / "g",
                GenerateConfig(max_new_tokens=3, limit=2, temperature=t, dtype="float16"),
            )
            for t in (0.0, 1.0)
        ),
        lambda: score(run / "rollouts", str(student), model, tmp_path / "s", ScoreConfig(k=4, dtype="float16")),
        lambda: prune(model, prompts, tmp_path / "p", PruneConfig(drop=1, dtype="float16")),
        lambda: evaluate(model, tmp_path / "e", EvalConfig(("sciq",), limit=2, dtype="float16"), rows),
        lambda: evaluate(model, tmp_path / "h", EvalConfig(("sciq",), limit=2, dtype="float16"), rows, run),
    ]
    for stage in stages:
        with pytest.raises(TsdkdError, match="in float16") as caught:
            stage()
        assert "--dtype" in caught.value.remedy


def test_a_model_that_diverged_does_not_respond(
    student: Path, teacher: Path, prompts: Path, rows: Path, tmp_path: Path
) -> None:
    """Its hidden states are finite; its logits overflow float32."""
    path, teachers = str(scaled(student, tmp_path / "diverged", "lm_head", 3e38)), {"": str(teacher)}
    config, generated = GenerateConfig(max_new_tokens=3, limit=2), EvalConfig(("gsm8k",), limit=2, max_new_tokens=4)
    stages: list[Callable[[], object]] = [
        lambda: generate(prompts, path, tmp_path / "g", config),
        lambda: generate(prompts, path, tmp_path / "g", replace(config, temperature=0)),
        lambda: generate(prompts, path, tmp_path / "g", replace(config, policy="speculative"), teachers=teachers),
        lambda: evaluate(path, tmp_path / "e", EvalConfig(("sciq",), limit=2), rows),
        lambda: evaluate(path, tmp_path / "e", generated, rows),
        lambda: evaluate(path, tmp_path / "e", replace(generated, temperature=1.0), rows),
    ]
    for stage in stages:
        with pytest.raises(NotFiniteError, match="in float32") as caught:
            stage()
        assert "--dtype" not in caught.value.remedy
