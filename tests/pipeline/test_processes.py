"""Several processes train like one process, to float32 rounding."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.commands import run as run_command
from tests.helpers.fsdp_on_cpu import FSDP
from tests.helpers.own_methods import write_method
from tests.helpers.prompts import write_prompts
from tests.helpers.ranks import Launcher, open_launcher
from tests.helpers.training import metrics, same_update, weights
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.score.stage import score

TWO = "tsdkd"
SHARDED = "tests.helpers.fsdp_on_cpu"
"""Modules that two ranks run."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.fixture(scope="module")
def run(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven responses: in batches of four, the last batch gives one rank fewer responses than the other."""
    directory = tmp_path_factory.mktemp("run")
    prompts = write_prompts(directory / "prompts.jsonl", 11)
    generate(prompts, str(student), directory / "rollouts", GenerateConfig(max_new_tokens=12))
    score(directory / "rollouts", str(student), str(teacher), directory / "scores", ScoreConfig(k=4))
    return directory


def with_fields(prompts: Path) -> Path:
    """The prompts, of which every third names the teacher a, the others b."""
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    named = [row | {"field": ["a", "b", "b"][i % 3]} for i, row in enumerate(rows)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in named))
    return prompts


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with open_launcher() as launcher:
        yield launcher


def learn(
    launcher: Launcher | None, output: Path, *options: object, module: str = TWO
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Without a launcher in this process, else as two ranks that run `module`."""
    command = ["train", "--checkpoint", output, "--precision", "float32"]
    command += [] if "--method" in options else ["--k", 4]
    command += ["--learning-rate", 1e-3, "--epochs", 2, "--batch-size", 4, *options]
    if launcher is None:
        run_command(*command)
        return results(output)
    environment = ENVIRONMENT | (FSDP if module == SHARDED else {})
    done = launcher.launch(module, [*map(str, command)], environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: tsdkd eval") == 1  # only rank 0 prints
    return results(output)


def results(output: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    return weights(output), metrics(output)


def offline(run: Path) -> list[object]:
    return ["--rollouts", run / "rollouts", "--scores", run / "scores"]


def online(run: Path, student: Path, teacher: Path) -> list[object]:
    """Two teachers; the other one has the student's weights."""
    prompts = with_fields(write_prompts(run / "fields.jsonl", 11))
    sampling = ["--engine", "transformers", "--sample-temperature", 0, "--max-new-tokens", 12]
    sampling += ["--max-prompt-tokens", 100, "--teacher-by", "field", "--teacher", f"a={student}"]
    return ["--prompts", prompts, "--student", student, "--teacher", f"b={teacher}", *sampling]


def test_two_processes_train_like_one(run: Path, student: Path, tmp_path: Path, launcher: Launcher) -> None:
    """Each rank has all weights; sometimes a rank has no sample."""
    options = *offline(run), "--opener", "adaptive"
    expected = learn(None, tmp_path / "one", *options, "--micro-batch-size", 4)
    for way in (["--micro-batch-size", 1], ["--micro-batch-tokens", 70]):  # several per rank and step
        require_same(learn(launcher, tmp_path / way[0], *options, *way), expected, student)


def test_two_processes_select_from_whole_steps_like_one(
    run: Path, student: Path, tmp_path: Path, launcher: Launcher
) -> None:
    """Statistics of the whole step, random numbers and a state; the last step gives one rank fewer responses."""
    options = *offline(run), "--method", write_method(tmp_path / "m.py")
    expected = learn(None, tmp_path / "one", *options, "--micro-batch-size", 4)
    require_same(learn(launcher, tmp_path / "two", *options, "--micro-batch-size", 1), expected, student)


@pytest.mark.parametrize("way", ["online", "lora"])
def test_two_processes_with_sharded_weights_train_like_one(
    run: Path, student: Path, teacher: Path, tmp_path: Path, launcher: Launcher, way: str
) -> None:
    """FSDP2: full training online with two teachers, packed, adapters offline; measured on held-out prompts."""
    options = online(run, student, teacher) if way == "online" else offline(run)
    options += ["--lora", "--merge", "--lora-targets", "lm_head,q_proj"] if way == "lora" else []
    options += ["--held-out", 0.3, "--eval-steps", 2]
    options += ["--micro-batch-tokens", 150] if way == "online" else ["--micro-batch-size", 2]
    expected = learn(None, tmp_path / "one", *options)
    checkpoint = learn(launcher, tmp_path / "sharded", *options, module=SHARDED)
    assert any("eval_kl" in entry for entry in expected[1])
    require_same(checkpoint, expected, student)


def test_two_processes_train_adapters_on_quantised_weights_like_one(
    run: Path, tmp_path: Path, launcher: Launcher
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs `pip install bitsandbytes`")
    options = [*offline(run), "--lora", "--quantize", "4bit", "--micro-batch-size", 2]
    learn(None, tmp_path / "one", *options)
    learn(launcher, tmp_path / "two", *options)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert same_update(two, one, {name: 0 * value for name, value in one.items()})


def require_same(found: tuple[Any, Any], expected: tuple[Any, Any], student: Path) -> None:
    """Weights and logs of two runs are equal to float32 rounding."""
    assert same_update(found[0], expected[0], weights(student))
    for entry, expected_entry in zip(found[1], expected[1], strict=True):
        assert entry == pytest.approx(expected_entry, rel=1e-4, abs=1e-6)
