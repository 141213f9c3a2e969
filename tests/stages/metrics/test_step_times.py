"""The time of a training step divides into parts without a rest, and is no part of the checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.training import CONFIG, SAMPLING, cut, metrics
from tsdkd.artifacts.files import TIMES_FILE
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.stages.config.train import OnlineConfig
from tsdkd.stages.metrics import step_times
from tsdkd.stages.metrics.step_times import StepTimes, timed
from tsdkd.stages.train.stage import train_online


def test_each_moment_belongs_to_the_innermost_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times.time, "perf_counter", iter([0, 1, 3, 6, 10, 15]).__next__)
    times = StepTimes(torch.device("cpu"))
    with timed("sampling"):  # before the step
        pass
    times.start()
    with timed("student"), timed("objective"):
        pass
    found = times.pop()
    with timed("sampling"):  # after it
        pass
    assert found == {"other": 1 + 5, "student": 2 + 4, "objective": 3, "whole": 15}


@pytest.mark.parametrize("packed", [False, True])
def test_a_run_keeps_the_times_of_each_step_beside_its_parts(
    prompts: Path, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    config = replace(CONFIG, online=OnlineConfig(sampling=SAMPLING), epochs=1)
    config = replace(config, micro_batch_size=None, micro_batch_tokens=150) if packed else config
    with monkeypatch.context() as patch:
        cut(patch, 2)
        with pytest.raises(RuntimeError, match="cut"):
            train_online(prompts, str(student), str(teacher), tmp_path / "c", config)
    train_online(prompts, str(student), str(teacher), tmp_path / "c", config)
    lines = [json.loads(line) for line in (tmp_path / "c" / TIMES_FILE).read_text().splitlines()]
    assert [line.pop("step") for line in lines] == [1, 2, 3]
    for line in lines:
        whole = line.pop("whole")
        assert line.keys() == {"sampling", "transfer", "teacher", "student", "objective", "optimizer", "other"}
        assert sum(line.values()) == pytest.approx(whole, abs=1e-4)
        assert min(line.values()) >= 0
    assert not [name for entry in metrics(tmp_path / "c") for name in entry if "seconds" in name]
    assert TIMES_FILE not in {part.file for part in load_manifest(tmp_path / "c").parts}
