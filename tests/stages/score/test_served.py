"""score with a served teacher: its columns beside those of the loaded teacher, refusals, and runs that continue."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.commands import refuse
from tests.helpers.teacher_server import FakeServer, model_at, random_model, serve
from tsdkd.artifacts.reader import read_artifact
from tsdkd.core import TSDKDConfig
from tsdkd.errors import ArtifactError, InputError, TsdkdError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.inspect import InspectConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.data import served_scoring
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.inspect.stage import inspect_scores
from tsdkd.stages.score.served import score_served
from tsdkd.stages.score.stage import score
from tsdkd.stages.teacher_server import connection
from tsdkd.stages.teacher_server.connection import KEY_VARIABLE
from tsdkd.stages.train.stage import train_offline

Contents = Callable[[Path], dict[str, bytes]]
CONFIG = ScoreConfig(signal="topk", k=4, top_k=64)
VOCAB = 258
KEY = "sk-Not-A-Secret-0123"


@pytest.fixture(scope="module")
def rollouts(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served")
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Count to {i}{"!" * (i % 3)}"}}\n' for i in range(8)))
    config = GenerateConfig(max_new_tokens=12, part_size=3)
    generate(prompts, str(student), directory / "rollouts", config)
    return directory / "rollouts"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(connection, "FIRST_PAUSE", 0.001)
    with serve(FakeServer(random_model(VOCAB), max_logprobs=100)) as server:
        yield server


def test_columns_are_those_of_the_loaded_teacher(
    fake: FakeServer, rollouts: Path, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_scoring, "MIN_CAPTURED_MASS", 0.3)  # the tiny teacher spreads its probability
    fake.scale_out, fake.log_probs = True, model_at(teacher)
    served = score_served(rollouts, str(student), fake.url, None, tmp_path / "served", CONFIG)
    loaded = score(rollouts, str(student), str(teacher), tmp_path / "loaded", CONFIG)
    optional = list(served_scoring.SERVED_COLUMNS)
    names = [*loaded.table().column_names, *optional]
    for row, exact in zip(served.table(names).to_pylist(), loaded.table().to_pylist(), strict=True):
        for name in ("sample_id", "candidates", "student_entropy", "student_log_prob"):
            assert row[name] == exact[name]
        for name in ("teacher_log_prob", "top_log_probs"):
            np.testing.assert_allclose(row[name], exact[name], atol=1e-4)
        assert row["top_ids"] == exact["top_ids"]
        assert row["ranks"] == exact["ranks"]
        assert (np.array(row["teacher_entropy_low"]) < row["teacher_entropy"]).all()
        assert (np.array(row["teacher_entropy_high"]) > row["teacher_entropy"]).all()
        assert not any(row["tied_candidates"])
        assert row["divergence"] is None
    manifest = served.manifest
    assert manifest.engine == "server"
    assert manifest.model("teacher").name == "served/teacher"
    assert 0.3 < manifest.summary["captured_mass"] < 1
    assert "divergence" not in manifest.summary


def test_candidates_outside_the_top_k_are_counted(
    fake: FakeServer, rollouts: Path, student: Path, tmp_path: Path
) -> None:
    served = score_served(rollouts, str(student), fake.url, None, tmp_path / "served", CONFIG)
    for row in served.table().to_pylist():
        candidates, tops = np.reshape(row["candidates"], (-1, 4)), np.reshape(row["top_ids"], (-1, 64))
        outside = ~(candidates[:, :, None] == tops[:, None]).any(-1)
        assert row["tied_candidates"] == outside.sum(-1).tolist()
    assert served.manifest.summary["tied_candidates"] > 0


def test_a_student_trains_from_them(fake: FakeServer, rollouts: Path, student: Path, tmp_path: Path) -> None:
    score_served(rollouts, str(student), fake.url, None, tmp_path / "scores", CONFIG)
    config = TrainConfig(batch_size=4, epochs=1.0, objective=TSDKDConfig(k=4))
    checkpoint = train_offline(rollouts, tmp_path / "scores", str(student), tmp_path / "checkpoint", config)
    assert checkpoint.manifest.model("teacher").name == "served/teacher"


def test_scores_are_inspected_without_loading_the_teacher(
    fake: FakeServer, rollouts: Path, student: Path, tmp_path: Path
) -> None:
    score_served(rollouts, str(student), fake.url, None, tmp_path / "scores", CONFIG)
    config = InspectConfig(k=4)
    assert inspect_scores(tmp_path / "scores", config, rollouts).tokens
    with pytest.raises(InputError, match="A server read served/teacher"):
        inspect_scores(tmp_path / "scores", config, rollouts, after=str(student))


@pytest.mark.parametrize("fault", ["gone", "other"])
def test_a_stopped_run_continues_to_the_same_scores(
    fake: FakeServer,
    rollouts: Path,
    student: Path,
    tmp_path: Path,
    contents: Contents,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "ATTEMPTS", 2)
    right, calls, fails_after = fake.log_probs, 0, 1_000_000
    other = random_model(VOCAB, seed=1)

    def failing(ids: list[int]) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls > fails_after and fault == "gone":
            fake.failures = ["500"] * 1000
        return other(ids) if calls > fails_after and fault == "other" else right(ids)

    fake.log_probs = failing
    whole = score_served(rollouts, str(student), fake.url, None, tmp_path / "whole", CONFIG)
    calls, fails_after = 0, calls * 4 // 5
    output = tmp_path / "stopped"
    with pytest.raises(TsdkdError, match="what is complete is kept" if fault == "gone" else "as another teacher"):
        score_served(rollouts, str(student), fake.url, None, output, CONFIG)
    partial = len(read_partial(output))
    assert 0 < partial < 3
    fake.failures, fake.log_probs = [], right
    fake.url = fake.url.replace("127.0.0.1", "localhost")  # the address is no part of the identity
    score_served(rollouts, str(student), fake.url, None, output, CONFIG)
    assert contents(output) == contents(whole.path)


def read_partial(output: Path) -> list[Path]:
    return sorted(output.glob("*.parquet"))


def test_another_teacher_does_not_continue_a_run(
    fake: FakeServer, rollouts: Path, student: Path, tmp_path: Path
) -> None:
    score_served(rollouts, str(student), fake.url, None, tmp_path / "scores", CONFIG)
    assert score_served(rollouts, str(student), fake.url, None, tmp_path / "scores", CONFIG)  # nothing to do
    fake.log_probs = random_model(VOCAB, seed=1)
    with pytest.raises(ArtifactError, match="model teacher was"):
        score_served(rollouts, str(student), fake.url, None, tmp_path / "scores", CONFIG)


def test_bad_input_is_refused_before_anything_is_written(
    fake: FakeServer, rollouts: Path, student: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scores"
    for config, message in (
        (replace(CONFIG, signal="hidden"), "Give --signal topk"),
        (replace(CONFIG, top_k=200), "--max-logprobs"),
        (replace(CONFIG, k=258), "smaller --k"),
        (replace(CONFIG, top_k=258), "smaller --top-k"),
        (replace(CONFIG, engine="vllm"), "Leave out --engine"),
        (replace(CONFIG, tensor_parallel=2), "--tensor-parallel works with vLLM only"),
        (replace(CONFIG, quantization="fp8"), "--quantization works with vLLM only"),
    ):
        with pytest.raises(InputError, match=message):
            score_served(rollouts, str(student), fake.url, None, output, config)
    fake.max_model_len = 40
    with pytest.raises(InputError, match="--max-model-len"):
        score_served(rollouts, str(student), fake.url, None, output, CONFIG)
    assert not output.exists()


def test_an_empty_address_is_refused(rollouts: Path, student: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    models = "--student", student, "--teacher-url", ""
    prompts = rollouts.parent / "prompts.jsonl"
    for command in (
        ("score", "--signal", "topk", "--rollouts", rollouts, "--scores", output, *models),
        ("train", "--prompts", prompts, "--checkpoint", output, *models),
    ):
        assert refuse(*command)[0] == "--teacher-url is no http(s) address."
    assert not output.exists()


def test_too_little_captured_mass_is_refused(fake: FakeServer, rollouts: Path, student: Path, tmp_path: Path) -> None:
    with pytest.raises(TsdkdError, match=r"hold only 0\.\d\d of its probability.*larger --top-k"):
        score_served(rollouts, str(student), fake.url, None, tmp_path / "scores", replace(CONFIG, top_k=1))


def test_keys_reach_no_file(
    fake: FakeServer, rollouts: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.key = KEY
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    score_served(rollouts, str(student), fake.url, None, tmp_path / "scores", CONFIG)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 3
    assert not [file for file in files if KEY.encode() in file.read_bytes()]
    assert not [file for file in files if fake.url.encode() in file.read_bytes() and file.name == "manifest.json"]
    assert read_artifact(tmp_path / "scores", "scores")
