"""Two workers write what one process writes, byte for byte, and a run that ends early continues."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.models import save_tiny_model
from tests.helpers.parallel_tasks import InProcessBackend, Messages
from tests.helpers.prompts import write_prompts
from tests.helpers.scored_runs import sampled_run
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.eval.stage import evaluate
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.parallel import part_files
from tsdkd.stages.score.stage import score

Contents = Callable[[Path], dict[str, bytes]]
GENERATION = GenerateConfig(max_new_tokens=12, part_size=3)
SCORING = ScoreConfig(k=4, batch_tokens=60)
BENCHMARKS = EvalConfig(("gsm8k", "sciq", "mbpp"), batch_size=2, max_new_tokens=12)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> InProcessBackend:
    """The two workers of `data_parallel=2`, in this process."""
    backend = InProcessBackend(2)
    monkeypatch.setattr("tsdkd.stages.parallel.local.LocalProcesses", lambda *_: backend)
    return backend


@pytest.fixture(scope="module")
def rollouts(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four responses in eight parts."""
    directory = tmp_path_factory.mktemp("one")
    return generate(
        write_prompts(directory / "prompts.jsonl", 24), str(student), directory / "rollouts", GENERATION
    ).path


@pytest.fixture(scope="module")
def scores(rollouts: Path, student: Path, teacher: Path) -> Path:
    return score(rollouts, str(student), str(teacher), rollouts.parent / "one", SCORING).path


def parallel(config: Any) -> Any:
    return replace(config, data_parallel=2)


def interrupt_at(number: int) -> Callable[[int, Any], bool]:
    """A driver that is interrupted when it has received so many outcomes."""
    received = count(1)

    def interrupt(*_: Any) -> bool:
        if next(received) == number:
            raise KeyboardInterrupt
        return False

    return interrupt


def complete_parts(output: Path) -> dict[str, int]:
    """The time of each part that is listed."""
    manifest = output / "manifest.json"
    listed = json.loads(manifest.read_text())["parts"] if manifest.exists() else []
    return {part["file"]: (output / part["file"]).stat().st_mtime_ns for part in listed}


def test_generate(student: Path, rollouts: Path, backend: InProcessBackend, contents: Contents) -> None:
    """The driver is interrupted; the same command continues, and loses a worker."""
    made = rollouts.parent / "prompts.jsonl", str(student), rollouts.parent / "two", parallel(GENERATION)
    backend.lost = interrupt_at(4)
    with pytest.raises(KeyboardInterrupt):
        generate(*made)
    kept = complete_parts(made[2])
    assert 0 < len(kept) < 8
    backend.lost = lambda number, _: number == 2
    generate(*made)
    assert len(backend.workers) == 5  # two, two, and one for the lost one
    assert kept.items() <= complete_parts(made[2]).items()
    assert contents(made[2]) == contents(rollouts)


def test_score_with_several_teachers(
    student: Path, teacher: Path, tmp_path: Path, backend: InProcessBackend, contents: Contents
) -> None:
    sampled_run(tmp_path, student)
    models = {"code": str(teacher), "math": str(save_tiny_model(tmp_path / "math", seed=7, layers=3, width=64))}
    one, two = (
        score(tmp_path / "rollouts", str(student), models, tmp_path / name, config)
        for name, config in (("one", SCORING), ("two", parallel(SCORING)))
    )
    assert len(backend.workers) == 2
    assert contents(two.path) == contents(one.path)


def test_an_interrupted_score_continues_with_another_number_of_workers(
    rollouts: Path, scores: Path, student: Path, teacher: Path, backend: InProcessBackend, contents: Contents
) -> None:
    """Of a lost worker's file, nothing stays."""
    output = rollouts.parent / "interrupted"
    interrupt = interrupt_at(7)
    backend.lost = lambda number, task: interrupt() or (number == 0 and task.file is not None)
    with pytest.raises(KeyboardInterrupt):
        score(rollouts, str(student), str(teacher), output, parallel(SCORING))
    kept = complete_parts(output)
    assert 0 < len(kept) < 9
    score(rollouts, str(student), str(teacher), output, SCORING)
    assert kept.items() <= complete_parts(output).items()
    assert contents(output) == contents(scores)
    backend.lost = lambda number, task: number == len(backend.workers) - 1 and task.file == "scores-00003.parquet"
    score(rollouts, str(student), str(teacher), output, parallel(SCORING), overwrite=True)
    assert contents(output) == contents(scores)


def test_eval(student: Path, rows: Path, tmp_path: Path, backend: InProcessBackend, contents: Contents) -> None:
    """Answers, log-likelihoods and programs; of samples, a prompt's second one may be in another batch."""
    sampled = replace(BENCHMARKS, tasks=("gsm8k",), temperature=1.0, samples=3)
    for name, config in (("greedy", BENCHMARKS), ("sampled", sampled)):
        one, two = (
            evaluate(str(student), tmp_path / workers / name, chosen, rows, allow_code_execution=True).path
            for workers, chosen in (("one", config), ("two", parallel(config)))
        )
        assert contents(two) == contents(one)
    assert len(backend.workers) == 4
    backend.lost = interrupt_at(7)
    evaluation = str(student), tmp_path / "cut" / "greedy", parallel(BENCHMARKS), rows
    with pytest.raises(KeyboardInterrupt):
        evaluate(*evaluation, allow_code_execution=True)
    kept = complete_parts(evaluation[1])
    assert kept
    backend.lost = lambda number, task: number == 6 and task is not None
    evaluate(*evaluation, allow_code_execution=True)
    assert len(backend.workers) == 9  # one is lost
    assert kept.items() <= complete_parts(evaluation[1]).items()
    assert contents(evaluation[1]) == contents(tmp_path / "one" / "greedy")


def test_a_killed_process_costs_no_complete_part(
    rollouts: Path,
    scores: Path,
    student: Path,
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    contents: Contents,
) -> None:
    """Real processes; one is killed when two parts are complete."""
    added = count()

    def add_and_kill(writer: Writer, part: part_files.WrittenPart) -> None:
        part_files.add_part(writer, part)
        if next(added) == 1:
            psutil.Process(part.process).kill()

    monkeypatch.setattr("tsdkd.stages.score.loop.add_part", add_and_kill)
    messages = Messages()
    found = score(
        rollouts, str(student), str(teacher), rollouts.parent / "killed", parallel(SCORING), observer=messages
    )
    assert contents(found.path) == contents(scores)
    assert sum("A worker was lost" in line for line in messages.lines) == 1


def test_torchrun_is_refused_once(rollouts: Path, teacher: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", "tsdkd"]
    command = [*launch, "score", "--rollouts", rollouts, "--teacher", teacher, "--scores", tmp_path / "s"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: tsdkd score starts its processes itself") == 1
    assert not (tmp_path / "s").exists()


def test_a_part_that_arrives_damaged_is_refused(
    rollouts: Path, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a worker had written it: the driver sees another process and other bytes."""
    monkeypatch.setattr(part_files.os, "getpid", iter(range(10**6)).__next__)
    monkeypatch.setattr(part_files, "file_digest", str)
    with pytest.raises(TsdkdError, match="arrived with another hash"):
        score(rollouts, str(student), str(teacher), tmp_path / "s", SCORING)


def test_a_directory_that_a_worker_does_not_see_receives_the_same_bytes(
    rollouts: Path,
    scores: Path,
    student: Path,
    teacher: Path,
    backend: InProcessBackend,
    monkeypatch: pytest.MonkeyPatch,
    contents: Contents,
) -> None:
    monkeypatch.setattr(
        part_files.Path, "is_file", lambda path: not path.name.endswith(".marker.tmp") and path.exists()
    )
    found = score(rollouts, str(student), str(teacher), rollouts.parent / "unseen", parallel(SCORING))
    assert contents(found.path) == contents(scores)


def test_models_over_all_gpus_and_parallel_processes_exclude_each_other(
    rollouts: Path, student: Path, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--device-map spreads"):
        score(rollouts, str(student), str(teacher), tmp_path / "s", parallel(replace(SCORING, device_map="auto")))
