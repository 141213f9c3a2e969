"""score: every column equals bare forwards of both models, one response at a time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.helpers.logits import bare_logits
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.artifacts.writer import TableWriter, Writer
from tsdkd.core import TSDKDConfig, entropy, generalized_jsd, token_selective_loss, tsdkd_loss
from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data import score_cost, scoring
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.parallel.part_files import WrittenPart
from tsdkd.stages.score import loop, pairs
from tsdkd.stages.score.scorer import Scorer
from tsdkd.stages.score.stage import score

Contents = Callable[[Path], dict[str, bytes]]
CONFIG = ScoreConfig(k=4, top_k=8, batch_tokens=256)


@pytest.fixture
def rollouts(student: Path, prompts: Path, tmp_path: Path) -> Path:
    generate(prompts, str(student), tmp_path / "rollouts", GenerateConfig(max_new_tokens=15, part_size=4))
    return tmp_path / "rollouts"


@pytest.mark.parametrize("signal", ["hidden", "hidden8", "topk", "ranks"])
def test_columns_equal_bare_forwards(
    rollouts: Path, student: Path, teacher: Path, tmp_path: Path, signal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scoring.CHUNK_BYTES, "cpu", 3 * 4 * 258)  # three positions at a time
    artifact = score(rollouts, str(student), str(teacher), tmp_path / "s", replace(CONFIG, signal=signal))
    models = load_model(str(student)), load_model(str(teacher))
    samples = OfflineSource(rollouts, tmp_path / "s")
    rows = read_artifact(rollouts, "rollouts").table().to_pylist()
    assert len(samples) == len(rows) == artifact.manifest.rows
    for i, row in enumerate(rows):
        sample = samples[i] | {name: values.numpy() for name, values in samples.recorded([samples[i]]).items()}
        q, p = (bare_logits(model, row) for model in models)
        token = torch.tensor(row["response_ids"]).unsqueeze(-1)
        close = {"rtol": 1e-4, "atol": 1e-5}
        assert sample["sample_id"] == row["sample_id"]
        np.testing.assert_allclose(sample["student_entropy"], entropy(q), **close)
        np.testing.assert_allclose(sample["teacher_entropy"], entropy(p), **close)
        np.testing.assert_allclose(sample["student_log_prob"], q.log_softmax(-1).gather(-1, token)[:, 0], **close)
        np.testing.assert_allclose(sample["teacher_log_prob"], p.log_softmax(-1).gather(-1, token)[:, 0], **close)
        candidates = sample["candidates"].reshape(-1, 4)
        np.testing.assert_array_equal(candidates, q.topk(4).indices)
        teacher_logits = p.gather(-1, torch.tensor(candidates, dtype=torch.long))
        by_rank = teacher_logits.gather(-1, torch.tensor(sample["ranks"].reshape(-1, 4), dtype=torch.long).argsort(-1))
        assert (by_rank.diff(dim=-1) <= 0).all()
        if signal == "topk":
            np.testing.assert_array_equal(sample["top_ids"].reshape(-1, 8), p.topk(8).indices)
            np.testing.assert_allclose(
                sample["top_log_probs"].reshape(-1, 8), p.log_softmax(-1).topk(8).values, **close
            )


def offline_and_online_loss(
    samples: OfflineSource, student: Path, teacher: Path, config: TSDKDConfig
) -> tuple[float, float, float]:
    """The loss of all samples from scores and from a loaded teacher, and the relative difference of their gradients."""
    models = load_model(str(student)), load_model(str(teacher))
    chosen = [samples[i] for i in range(len(samples))]
    longest = max(len(s["response_ids"]) for s in chosen)
    mask = torch.zeros(len(chosen), longest, dtype=torch.bool)
    q, p = (torch.zeros(len(chosen), longest, len(models[0].tokenizer)) for _ in range(2))
    for i, sample in enumerate(chosen):
        length = len(sample["response_ids"])
        mask[i, :length] = True
        q[i, :length], p[i, :length] = (bare_logits(model, sample) for model in models)
    q.requires_grad_()
    online, _ = tsdkd_loss(q, p, mask, config)
    (online_grad,) = torch.autograd.grad(online, q)
    signal = samples.decoder.decode(samples.recorded(chosen))
    offline, _ = token_selective_loss(q[mask], signal, mask, config)
    (offline_grad,) = torch.autograd.grad(offline, q)
    difference = (offline_grad - online_grad).abs().max() / online_grad.abs().max()
    return offline.item(), online.item(), float(difference)


@pytest.mark.parametrize("changes", [{}, {"beta": 0.0}, {"temperature": 2.0}, {"k": 7}, {"opener": 1.0, "gate": False}])
def test_hidden_states_give_the_loss_of_a_loaded_teacher_to_rounding(
    rollouts: Path, student: Path, teacher: Path, tmp_path: Path, changes: dict[str, float]
) -> None:
    """With any beta and temperature, and with more candidates than were recorded."""
    score(rollouts, str(student), str(teacher), tmp_path / "s", CONFIG)
    config = TSDKDConfig(**({"k": 4} | changes))
    offline, online, difference = offline_and_online_loss(
        OfflineSource(rollouts, tmp_path / "s"), student, teacher, config
    )
    assert offline == pytest.approx(online, rel=1e-5)
    assert difference < 1e-4


def test_topk_bounds_the_direct_term_from_below(rollouts: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    artifact = score(rollouts, str(student), str(teacher), tmp_path / "s", replace(CONFIG, signal="topk", top_k=40))
    config = TSDKDConfig(k=4, alpha=0, em_weight=0)
    offline, online, _ = offline_and_online_loss(OfflineSource(rollouts, tmp_path / "s"), student, teacher, config)
    assert 0.2 * online < offline < online
    logged = read_artifact(tmp_path / "s", "scores").table()["top_log_probs"].combine_chunks().flatten().to_numpy()
    mass = np.exp(logged).sum() / artifact.manifest.summary["response_tokens"]
    assert artifact.manifest.summary["captured_mass"] == pytest.approx(mass)
    assert 0.2 < mass < 1


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_batches_do_not_change_what_is_recorded(
    rollouts: Path, student: Path, teacher: Path, tmp_path: Path, batch_tokens: int
) -> None:
    one = score(rollouts, str(student), str(teacher), tmp_path / "one", CONFIG).table()
    other = score(
        rollouts, str(student), str(teacher), tmp_path / "o", replace(CONFIG, batch_tokens=batch_tokens)
    ).table()
    assert one["candidates"] == other["candidates"]
    assert one["ranks"] == other["ranks"]
    for column in ("student_entropy", "teacher_entropy", "student_log_prob", "teacher_log_prob"):
        a, b = (table[column].combine_chunks().flatten().to_numpy() for table in (one, other))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    states = (b"".join(table["hidden"].to_pylist()) for table in (one, other))
    a, b = (np.frombuffer(column, dtype=np.float32) for column in states)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["part-00001.parquet", "part-00002.parquet"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    rollouts: Path,
    student: Path,
    teacher: Path,
    tmp_path: Path,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
) -> None:
    """An error of the background thread fails the stage, also at the last part."""
    score(rollouts, str(student), str(teacher), tmp_path / "whole", CONFIG)
    close = Scorer._close

    def interrupted(scorer: Scorer, writer: TableWriter, file: str, path: Path) -> WrittenPart:
        if file == part:
            raise OSError("the disk is gone")
        return close(scorer, writer, file, path)

    monkeypatch.setattr(Scorer, "_close", interrupted)
    with pytest.raises(OSError, match="the disk is gone"):
        score(rollouts, str(student), str(teacher), tmp_path / "cut", CONFIG)
    monkeypatch.undo()
    score(rollouts, str(student), str(teacher), tmp_path / "cut", CONFIG)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


class RecordingObserver(SilentObserver):
    """Keeps messages and tables."""

    def __init__(self) -> None:
        self.tables: list[dict[str, str]] = []
        self.messages: list[str] = []

    def info(self, message: str) -> None:
        self.messages.append(message)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        self.tables.append(dict(rows))


def test_the_reported_cost_equals_the_scores_on_disk(
    rollouts: Path, student: Path, teacher: Path, tmp_path: Path
) -> None:
    observer = RecordingObserver()
    artifact = score(rollouts, str(student), str(teacher), tmp_path / "s", CONFIG, observer=observer)
    (cost,) = observer.tables
    tokens = artifact.manifest.summary["response_tokens"]
    assert cost["response tokens"] == f"{tokens:,}"
    assert cost["bytes per token (hidden)"] == str(16 + 4 * 6 + 48 * 4)  # float32 teacher of width 48
    hidden = sum(len(value) for value in artifact.table()["hidden"].to_pylist())
    assert hidden == tokens * 48 * 4
    assert cost["teacher's head, once"] == f"{258 * 48 * 4 / 1e6:.2f} MB"
    assert cost["expected time"].endswith(" min")
    assert artifact.manifest.summary["expected_bytes"] == tokens * (16 + 4 * 6 + 48 * 4) + 258 * 48 * 4


def test_an_interrupted_finish_resumes_without_loading_models(
    rollouts: Path, student: Path, teacher: Path, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part is written, and the manifest is still partial."""
    score(rollouts, str(student), str(teacher), tmp_path / "whole", CONFIG)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(rollouts, str(student), str(teacher), tmp_path / "cut", CONFIG)
    monkeypatch.undo()
    monkeypatch.setattr(pairs, "load_model", interrupted)
    score(rollouts, str(student), str(teacher), tmp_path / "cut", CONFIG)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_small_disk_is_refused_before_scoring(
    rollouts: Path, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Disk:
        free = 1000

    monkeypatch.setattr(loop.shutil, "disk_usage", lambda _: Disk)
    with pytest.raises(TsdkdError, match="Scores need") as caught:
        score(rollouts, str(student), str(teacher), tmp_path / "s", CONFIG)
    assert not (tmp_path / "s").exists()
    assert "--signal hidden8 or topk" in caught.value.remedy


def test_a_warning_names_another_author(rollouts: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    observer = RecordingObserver()
    score(rollouts, str(teacher), str(student), tmp_path / "s", CONFIG, observer=observer)
    assert any(message.startswith("Another student sampled the rollouts: ") for message in observer.messages)


@pytest.mark.parametrize("config", [replace(CONFIG, k=258), replace(CONFIG, signal="topk", top_k=300)])
def test_more_candidates_than_tokens_are_refused(
    rollouts: Path, student: Path, teacher: Path, tmp_path: Path, config: ScoreConfig
) -> None:
    with pytest.raises(InputError, match="vocabulary has only 258"):
        score(rollouts, str(student), str(teacher), tmp_path / "s", config)


def test_small_blocks_and_small_parts_do_not_change_a_value(
    rollouts: Path, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one response; rows keep the order of the rollouts."""
    whole = score(rollouts, str(student), str(teacher), tmp_path / "whole", CONFIG).table()
    monkeypatch.setattr(score_cost, "BLOCK_BYTES", 1)
    one = score(rollouts, str(student), str(teacher), tmp_path / "one", CONFIG)
    assert whole["sample_id"] == one.table()["sample_id"] == read_artifact(rollouts, "rollouts").table()["sample_id"]
    assert whole["candidates"] == one.table()["candidates"]


def test_a_model_that_cannot_pack_is_named_and_scores_the_same(
    rollouts: Path, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = score(rollouts, str(student), str(teacher), tmp_path / "packed", CONFIG).table()
    monkeypatch.setattr(LanguageModel, "packing_problem", "mixes sequences")
    observer = RecordingObserver()
    padded = score(rollouts, str(student), str(teacher), tmp_path / "padded", CONFIG, observer=observer).table()
    assert f"{teacher} reads padded batches: it mixes sequences." in observer.messages
    assert padded["candidates"] == packed["candidates"]
    a, b = (table["teacher_entropy"].combine_chunks().flatten().to_numpy() for table in (packed, padded))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_int8_stores_a_byte_per_value_and_measures_its_error(
    rollouts: Path, student: Path, teacher: Path, tmp_path: Path
) -> None:
    """The exact divergence equals that of a loaded teacher; the error is the mean absolute difference."""
    config = replace(CONFIG, signal="hidden8")
    summary = score(rollouts, str(student), str(teacher), tmp_path / "s", config).manifest.summary
    samples = OfflineSource(rollouts, tmp_path / "s")
    for i in range(len(samples)):
        hidden = samples.recorded([samples[i]])["hidden"]
        assert (hidden.dtype, hidden.shape) == (torch.int8, (len(samples[i]["response_ids"]), 48))
    models = load_model(str(student)), load_model(str(teacher))
    exact, recorded = [], []
    for i in range(len(samples)):
        q, p = (bare_logits(model, samples[i]) for model in models)
        exact.append(generalized_jsd(q, p, TSDKDConfig.beta))
        signal = samples.decoder.decode(samples.recorded([samples[i]])).materialized()
        recorded.append(signal.divergence(q.log_softmax(-1), TSDKDConfig().formula, 1.0))
    error = (torch.cat(exact) - torch.cat(recorded)).abs().mean()
    assert summary["divergence"] == pytest.approx(float(torch.cat(exact).mean()), rel=1e-4)
    assert summary["signal_divergence"] == pytest.approx(float(torch.cat(recorded).mean()), rel=1e-4)
    assert summary["divergence_error"] == pytest.approx(float(error), rel=1e-2)
    assert 0 < summary["divergence_error"] < 0.01 * summary["divergence"]


def test_opening_scores_does_not_read_all_parts_at_once(
    rollouts: Path, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(rollouts, str(student), str(teacher), tmp_path / "s", replace(CONFIG, signal="topk"))
    table = Artifact.table

    def rollouts_alone(artifact: Artifact, columns: list[str]) -> pa.Table:
        assert artifact.manifest.kind == "rollouts"
        return table(artifact, columns)

    monkeypatch.setattr(Artifact, "table", rollouts_alone)
    OfflineSource(rollouts, tmp_path / "s")


def test_topk_reports_the_captured_mass(rollouts: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    artifact = score(rollouts, str(student), str(teacher), tmp_path / "s", replace(CONFIG, signal="topk", top_k=40))
    summary = artifact.manifest.summary
    logged = artifact.table()["top_log_probs"].combine_chunks().flatten().to_numpy().reshape(-1, 40)
    masses = np.exp(logged).sum(-1)
    assert summary["captured_mass"] == pytest.approx(masses.mean())
    assert summary["captured_mass_p01"] == pytest.approx(np.quantile(masses, 0.01, method="inverted_cdf"), abs=2e-4)
    assert summary["signal_divergence"] < summary["divergence"]
    assert summary["divergence_error"] == pytest.approx(summary["divergence"] - summary["signal_divergence"], rel=1e-4)


def test_a_device_map_changes_nothing(
    rollouts: Path, student: Path, teacher: Path, tmp_path: Path, contents: Contents
) -> None:
    """Scores do not depend on the devices that hold a model."""
    score(rollouts, str(student), str(teacher), tmp_path / "one", CONFIG)
    score(rollouts, str(student), str(teacher), tmp_path / "auto", replace(CONFIG, device_map="auto"))
    assert contents(tmp_path / "one") == contents(tmp_path / "auto")
