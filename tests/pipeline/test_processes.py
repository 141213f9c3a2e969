"""Several processes give the scores of one process, byte for byte, and its training, to float32 rounding."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.commands import run as run_command
from tests.helpers.fsdp_on_cpu import FSDP
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tests.helpers.ranks import Launcher, open_launcher
from tests.helpers.training import metrics, same_update, weights
from tsdkd.artifacts.journal import read_sessions
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.score.stage import score

Contents = Callable[[Path], dict[str, bytes]]
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


@pytest.fixture(scope="module")
def many(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seventy responses in fourteen parts, whose prompts name two teachers."""
    directory = tmp_path_factory.mktemp("many")
    prompts = with_fields(write_prompts(directory / "prompts.jsonl", 70))
    config = GenerateConfig(max_new_tokens=30, part_size=5, teacher_by="field")
    generate(prompts, str(student), directory / "rollouts", config)
    return directory


@pytest.fixture(scope="module")
def teachers(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Of two widths, as words of a command."""
    other = save_tiny_model(tmp_path_factory.mktemp("teachers") / "other", seed=7, layers=3, width=64)
    return ["--teacher", f"a={teacher}", "--teacher", f"b={other}"]


def with_fields(prompts: Path) -> Path:
    """The prompts, of which every third names the teacher a, the others b."""
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    named = [row | {"field": ["a", "b", "b"][i % 3]} for i, row in enumerate(rows)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in named))
    return prompts


def score_command(many: Path, teachers: list[object], output: Path) -> list[str]:
    command = ["score", "--run", many, *teachers, "--scores", output, "--k", 4, "--batch-tokens", 60]
    return [*map(str, command)]


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with open_launcher() as launcher:
        yield launcher


@pytest.fixture(scope="module")
def scored_by_one(many: Path, teachers: list[object]) -> Path:
    run_command(*score_command(many, teachers, many / "one"))
    return many / "one"


def test_two_processes_write_the_scores_of_one(
    many: Path,
    teachers: list[object],
    tmp_path: Path,
    scored_by_one: Path,
    contents: Callable[[Path], dict[str, bytes]],
    launcher: Launcher,
) -> None:
    done = launcher.launch(TWO, score_command(many, teachers, tmp_path / "two"), ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: tsdkd train") == 1
    assert 1 <= done.stdout.count("expected time") <= 2  # of each teacher that the main rank reads with
    expected, found = contents(scored_by_one), contents(tmp_path / "two")
    assert [(session.processes, session.exit) for session in read_sessions(tmp_path / "two")] == [(2, "finished")]
    manifests = [json.loads(files.pop("manifest.json")) for files in (expected, found)]
    for manifest in manifests:
        manifest["parents"][0].pop("path")  # relative to the output
        manifest.pop("sha256")  # of a manifest with that path
    assert found == expected
    assert manifests[0] == manifests[1]


def test_one_process_resumes_what_two_began(
    many: Path,
    teachers: list[object],
    tmp_path: Path,
    scored_by_one: Path,
    contents: Callable[[Path], dict[str, bytes]],
) -> None:
    """Rank 0 is killed with -9 and torchrun ends rank 1; one process then resumes to the same bytes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", TWO]
    process = subprocess.Popen(
        [*command, *score_command(many, teachers, tmp_path / "two")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    while len(listed(tmp_path / "two")) < 4:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    os.kill(first_worker(process.pid), signal.SIGKILL)
    assert process.wait() != 0
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["state"] == "partial"
    run_command(*score_command(many, teachers, tmp_path / "two"))
    expected, found = contents(scored_by_one), contents(tmp_path / "two")
    del expected["manifest.json"], found["manifest.json"]
    assert found == expected


def listed(output: Path) -> list[str]:
    manifest = output / "manifest.json"
    return [part["file"] for part in json.loads(manifest.read_text())["parts"]] if manifest.exists() else []


def first_worker(launcher: int) -> int:
    """The process id of rank 0."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return next(int(child) for child in children if "RANK=0" in Path(f"/proc/{child}/environ").read_text().split("\0"))


def test_an_error_is_printed_once(
    many: Path, other_family: Path, student: Path, tmp_path: Path, launcher: Launcher
) -> None:
    """Rank 0 prints the error; rank 1 ends silently."""
    teachers: list[object] = ["--teacher", f"a={student}", "--teacher", f"b={other_family}"]
    done = launcher.launch(TWO, score_command(many, teachers, tmp_path / "s"), ENVIRONMENT)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("error:") == 1
    assert "different tokenizers" in done.stderr
    assert not (tmp_path / "s").exists()


def learn(
    launcher: Launcher | None, output: Path, *options: object, module: str = TWO
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Without a launcher in this process, else as two ranks that run `module`."""
    command = ["train", "--checkpoint", output, "--k", 4, "--precision", "float32"]
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
