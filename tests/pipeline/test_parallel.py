"""Two worker processes write what one process writes, byte for byte, and a killed run continues."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tests.helpers.scored_runs import sampled_run
from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.eval.stage import evaluate
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.parallel import part_files
from tsdkd.stages.score.stage import score

Contents = Callable[[Path], dict[str, bytes]]
GENERATION = GenerateConfig(max_new_tokens=30, part_size=5)
SCORING = ScoreConfig(k=4, batch_tokens=60)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", 70)


@pytest.fixture(scope="module")
def rollouts(student: Path, prompts: Path) -> Path:
    """Seventy responses in fourteen parts."""
    return generate(prompts, str(student), prompts.parent / "rollouts", GENERATION).path


@pytest.fixture(scope="module")
def scores(rollouts: Path, student: Path, teacher: Path) -> Path:
    return score(rollouts, str(student), str(teacher), rollouts.parent / "one", SCORING).path


def test_generate(student: Path, prompts: Path, rollouts: Path, contents: Contents) -> None:
    two = generate(prompts, str(student), prompts.parent / "two", replace(GENERATION, data_parallel=2))
    assert contents(two.path) == contents(rollouts)


def test_score_with_several_teachers(student: Path, teacher: Path, tmp_path: Path, contents: Contents) -> None:
    sampled_run(tmp_path, student)
    models = {"code": str(teacher), "math": str(save_tiny_model(tmp_path / "math", seed=7, layers=3, width=64))}
    one, two = (
        score(tmp_path / "rollouts", str(student), models, tmp_path / name, replace(SCORING, data_parallel=number))
        for name, number in (("one", None), ("two", 2))
    )
    assert contents(two.path) == contents(one.path)
    assert not [*two.path.glob("*.tmp")]


def test_eval(student: Path, rows: Path, tmp_path: Path, contents: Contents) -> None:
    """Generated responses and log-likelihoods; of samples, a prompt's second one may be in another batch."""
    greedy = EvalConfig(("gsm8k", "sciq"), batch_size=2, max_new_tokens=12)
    for config in (greedy, replace(greedy, tasks=("gsm8k",), temperature=1.0, samples=3)):
        name = str(config.samples)
        one, two = (
            evaluate(str(student), tmp_path / processes / name, replace(config, data_parallel=number), rows).path
            for processes, number in (("one", None), ("two", 2))
        )
        assert contents(two) == contents(one)


def scoring(rollouts: Path, teacher: Path, output: Path, *options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tsdkd", "score", "--rollouts", rollouts, "--teacher", teacher]
    command += ["--scores", output, "--k", 4, "--batch-tokens", 60, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_for_parts(process: subprocess.Popen[str], output: Path, count: int) -> None:
    while len(listed(output)) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def listed(output: Path) -> Sequence[Any]:
    manifest = output / "manifest.json"
    parts: list[Any] = json.loads(manifest.read_text())["parts"] if manifest.exists() else []
    return parts


def test_killed_workers_and_a_killed_driver_cost_no_complete_part(
    rollouts: Path, scores: Path, teacher: Path, contents: Contents
) -> None:
    """A worker is killed first; then the driver, whose workers end with it. The same command continues."""
    output = rollouts.parent / "killed"
    process = scoring(rollouts, teacher, output, "--data-parallel", 2)
    wait_for_parts(process, output, 2)
    workers = psutil.Process(process.pid).children()
    workers[-1].kill()
    wait_for_parts(process, output, 6)
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(workers, timeout=60)[1]
    complete = {part["file"]: (output / part["file"]).stat().st_mtime_ns for part in listed(output)}
    assert 6 <= len(complete) < 15
    resumed = scoring(rollouts, teacher, output, "--data-parallel", 2)
    _, stderr = resumed.communicate()
    assert resumed.returncode == 0, stderr
    assert complete.items() <= {file.name: file.stat().st_mtime_ns for file in output.iterdir()}.items()
    assert contents(output) == contents(scores)


def test_a_launcher_is_refused_once(rollouts: Path, teacher: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", "tsdkd"]
    command = [*launch, "score", "--rollouts", rollouts, "--teacher", teacher, "--scores", tmp_path / "s"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: tsdkd score is started once") == 1
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
    rollouts: Path, scores: Path, student: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, contents: Contents
) -> None:
    monkeypatch.setattr(
        part_files.Path, "is_file", lambda path: not path.name.endswith(".marker.tmp") and path.exists()
    )
    found = score(rollouts, str(student), str(teacher), rollouts.parent / "unseen", SCORING)
    assert contents(found.path) == contents(scores)


def test_models_over_all_gpus_and_parallel_processes_exclude_each_other(
    rollouts: Path, student: Path, teacher: Path, tmp_path: Path
) -> None:
    config = replace(SCORING, device_map="auto", data_parallel=2)
    with pytest.raises(InputError, match="--device-map spreads"):
        score(rollouts, str(student), str(teacher), tmp_path / "s", config)
