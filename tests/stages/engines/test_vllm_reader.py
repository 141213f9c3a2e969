"""score --engine vllm without vLLM: transformers stands for its process (test_vllm_scores.py has the real one)."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.adapters import save_adapter
from tests.helpers.dying_child import end_early
from tests.helpers.prompts import write_prompts
from tests.helpers.readers import ReadingProcess
from tests.helpers.training import RecordingObserver
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.reader import read_artifact
from tsdkd.core import Head
from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.scoring import score_in_turn, score_responses
from tsdkd.stages.engines import choice, reader_check, vllm_reader
from tsdkd.stages.engines.vllm_engine import EngineProcess
from tsdkd.stages.engines.vllm_reader import VllmReader, open_readers, reading_arguments
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.language_model import share_vocab
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.spec import load_spec
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.score import stage
from tsdkd.stages.score.stage import score

Contents = Callable[[Path], dict[str, bytes]]
CONFIG = ScoreConfig(engine="vllm", k=4, top_k=8, batch_tokens=256, dtype="float32", tensor_parallel=2)


@pytest.fixture(autouse=True)
def transformers_stands_for_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_reader, "EngineProcess", ReadingProcess)
    monkeypatch.setattr(reader_check, "EngineProcess", ReadingProcess)
    monkeypatch.setattr(choice, "has_vllm", lambda: True)
    monkeypatch.setattr(stage, "engine_version", lambda engine: {"vllm": "0"} if engine == "vllm" else {})
    monkeypatch.setattr(ReadingProcess, "started", [])


@pytest.fixture(scope="module")
def rollouts(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts."""
    directory = tmp_path_factory.mktemp("rollouts")
    prompts = write_prompts(directory / "prompts.jsonl", 10)
    generate(prompts, str(student), directory / "r", GenerateConfig(max_new_tokens=15, part_size=4))
    return directory / "r"


def read(path: Path) -> list[dict[str, Any]]:
    return read_artifact(path, "scores").table().to_pylist()


def test_scores_are_those_of_transformers(rollouts: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    observer = RecordingObserver()
    score(rollouts, str(student), str(teacher), tmp_path / "v", CONFIG, observer)
    plain = replace(CONFIG, engine="transformers", tensor_parallel=1)
    score(rollouts, str(student), str(teacher), tmp_path / "t", plain)
    by_vllm, by_transformers = (read_artifact(tmp_path / name, "scores").table().to_pylist() for name in "vt")
    for ours, theirs in zip(by_vllm, by_transformers, strict=True):
        for name in ("sample_id", "candidates", "ranks"):
            assert ours[name] == theirs[name]
        for name in ("student_entropy", "teacher_entropy", "student_log_prob", "teacher_log_prob"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5)
    manifest = load_manifest(tmp_path / "v")
    assert manifest.engine == manifest.config["engine"] == "vllm"
    assert manifest.libraries["vllm"] == "0"
    assert manifest.config["tensor_parallel"] == 2
    assert "memory_fraction" not in manifest.config
    checks = [message.split(":")[0] for message in observer.messages if "nats per token" in message]
    assert checks == [str(student), str(teacher)]


def test_turns_and_single_tokens_are_scored_as_by_transformers(student: Path, teacher: Path) -> None:
    rows = [
        {"sample_id": "a", "prompt_ids": [1, 2, 3], "response_ids": [4, 5, 6, 7, 8]},
        {"sample_id": "b", "prompt_ids": [9], "response_ids": [4, 5, 6, 7], "response_mask": [True, False, True, True]},
        {"sample_id": "c", "prompt_ids": [1, 2, 3], "response_ids": [4]},
        {"sample_id": "d", "prompt_ids": [1, 2, 3], "response_ids": [4]},
    ]
    models = share_vocab(load_model(str(student)), load_model(str(teacher)))
    expected = [score_responses(rows[:2], models, CONFIG), score_responses(rows[2:], models, CONFIG)]
    sequences = [row["prompt_ids"] + row["response_ids"] for row in rows]
    with open_readers(str(student), str(teacher), CONFIG, 8, sequences, SilentObserver()) as readers:
        scored = list(score_in_turn([rows[:2], rows[2:]], readers, CONFIG))
    for ours, theirs in zip(chain(*scored), chain(*expected), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"sample_id"}:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_an_adapter_is_merged_first(student: Path, teacher: Path, tmp_path: Path) -> None:
    adapter = save_adapter(student, tmp_path / "adapter")
    with open_readers(str(adapter), str(teacher), CONFIG, 8, [[1, 2, 3, 4]], SilentObserver()):
        assert ReadingProcess.started[0]["model"] != str(student)
    assert not Path(ReadingProcess.started[0]["model"]).exists()


@pytest.mark.parametrize(
    "change",
    [lambda hidden: hidden.roll(1, 0), lambda hidden: hidden * 1.1, lambda hidden: hidden * float("nan")],
    ids=["another position", "before the norm", "not finite"],
)
def test_the_check_refuses_other_states(
    rollouts: Path,
    student: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    monkeypatch.setattr(ReadingProcess, "change", staticmethod(change))
    with pytest.raises(TsdkdError, match=f"states of {student} and transformers disagree: .* nats per token"):
        score(rollouts, str(student), str(teacher), tmp_path / "s", CONFIG)
    assert not (tmp_path / "s").exists()


def test_states_of_another_width_are_refused(student: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReadingProcess, "change", staticmethod(lambda hidden: hidden[:, :-1]))
    with (
        pytest.raises(TsdkdError, match=r"shape \(4, 31\) for 4 tokens"),
        open_readers(str(student), str(teacher), CONFIG, 8, [[1, 2, 3, 4]], SilentObserver()),
    ):
        pass


@pytest.mark.parametrize("shifted", [False, True])
def test_a_model_that_exceeds_the_memory_is_checked_with_its_own_head(
    student: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, shifted: bool
) -> None:
    """The head's padding rows count for vLLM; its process may sample one token."""
    monkeypatch.setattr(reader_check, "available_memory", lambda _: 0)
    if shifted:
        monkeypatch.setattr(ReadingProcess, "change", staticmethod(lambda hidden: hidden.roll(1, 0)))
    observer = RecordingObserver()
    opened = open_readers(str(student), str(teacher), CONFIG, 8, [[1, 2, 3, 4], [5, 6]], observer)
    if shifted:
        with pytest.raises(TsdkdError, match="and vLLM's own head disagree"), opened:
            pass
        return
    with opened:
        assert [message.count("vLLM's own head differ by 0.00000") for message in observer.messages] == [1, 1]
    assert [arguments["max_model_len"] for arguments in ReadingProcess.started] == [9, 9, 8, 8]


def test_vllm_gets_the_memory_that_the_weights_leave(student: Path, teacher: Path) -> None:
    specs = load_spec(str(student)), load_spec(str(teacher))
    config = replace(CONFIG, quantization="fp8", memory_fraction=0.5)
    small, large = reading_arguments(*specs, config, 300)
    assert small["gpu_memory_utilization"] + large["gpu_memory_utilization"] == pytest.approx(0.5)
    assert "tensor_parallel_size" not in small
    assert "quantization" not in small
    assert (large["tensor_parallel_size"], large["quantization"]) == (2, "fp8")
    for arguments in (small, large):
        assert arguments["max_model_len"] == arguments["max_num_batched_tokens"] == 300
        assert not arguments["enable_prefix_caching"]
        assert not arguments["enable_chunked_prefill"]
    with pytest.raises(TsdkdError, match="weights of both models need"):
        reading_arguments(*specs, replace(config, memory_fraction=1e-9), 300)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"device_map": "auto"}, "--device-map works with transformers only"),
        ({"attention": "sdpa"}, "--attention works with transformers only"),
        ({"engine": "transformers"}, "--tensor-parallel works with vLLM only"),
        ({"engine": "transformers", "tensor_parallel": 1, "quantization": "fp8"}, "--quantization works with vLLM"),
    ],
    ids=str,
)
def test_options_of_the_other_engine_are_refused(
    rollouts: Path, student: Path, teacher: Path, tmp_path: Path, changes: dict[str, Any], cause: str
) -> None:
    with pytest.raises(InputError, match=cause):
        score(rollouts, str(student), str(teacher), tmp_path / "s", replace(CONFIG, **changes))
    assert not (tmp_path / "s").exists()


def test_a_missing_vllm_is_refused(
    rollouts: Path, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "has_vllm", lambda: False)
    with pytest.raises(InputError, match="not installed"):
        score(rollouts, str(student), str(teacher), tmp_path / "s", CONFIG)


@pytest.mark.parametrize("messages", [0, 6])
def test_a_run_whose_vllm_is_killed_resumes_to_the_same_bytes(
    rollouts: Path,
    student: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    contents: Contents,
    messages: int,
) -> None:
    score(rollouts, str(student), str(teacher), tmp_path / "whole", CONFIG)
    monkeypatch.setattr(ReadingProcess, "remaining", messages)
    with pytest.raises(TsdkdError, match="vLLM failed: its process ended with status -9"):
        score(rollouts, str(student), str(teacher), tmp_path / "cut", CONFIG)
    monkeypatch.setattr(ReadingProcess, "remaining", None)
    score(rollouts, str(student), str(teacher), tmp_path / "cut", CONFIG)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("end", ["before the message is read", "before the states", "within the states"])
def test_a_child_that_dies_is_named(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """A real process, whose pipe fails in another way each time."""
    monkeypatch.setattr(vllm_reader, "EngineProcess", EngineProcess)
    monkeypatch.setattr(vllm_reader, "read_hidden", end_early)
    spec: Any = SimpleNamespace(name="model")
    with VllmReader(spec, Head(torch.zeros(5, 4)), {"end": end}) as reader:
        reader.start([[1, 2, 3]])
        with pytest.raises(TsdkdError, match="vLLM failed: its process ended with status 0") as caught:
            reader.finish()
        Path(caught.value.remedy.split()[-1].rstrip(".")).unlink()
