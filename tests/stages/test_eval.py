"""eval: lm-eval's numbers on local rows, and closeness to the teacher against bare forwards."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import write_prompts
from tests.stages.test_score import bare_logits
from tsdkd.artifacts import read
from tsdkd.core import entropy
from tsdkd.errors import InputError
from tsdkd.stages import eval as stage
from tsdkd.stages.benchmarks import BENCHMARKS, EMBEDDED_DATA
from tsdkd.stages.config import EvalConfig, GenerateConfig, ScoreConfig
from tsdkd.stages.eval import evaluate
from tsdkd.stages.generate import generate
from tsdkd.stages.models import chat_ids, load_model
from tsdkd.stages.score import score


@pytest.fixture(scope="module")
def heldout(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the teacher's own responses."""
    place = tmp_path_factory.mktemp("heldout")
    prompts = write_prompts(place / "prompts.jsonl", 6)
    generate(prompts, str(teacher), place / "rollouts", GenerateConfig(policy="teacher", max_new_tokens=9))
    score(place / "rollouts", str(student), str(teacher), place / "scores", ScoreConfig(k=4))
    return place


def test_the_embedded_benchmark_is_which_value_is_likelier(student: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    artifact = evaluate(str(student), tmp_path / "r", EvalConfig(limit=12))
    reader = load_model(str(student))
    right = []
    for document in pq.read_table(EMBEDDED_DATA / "benchmark.parquet").to_pylist()[:12]:
        asked = chat_ids(reader.tokenizer, [{"role": "user", "content": document["prompt"]}])
        asked += reader.tokenizer(document["beginning"], add_special_tokens=False).input_ids
        likely = {}
        for choice in document["choices"]:
            continuation = reader.tokenizer(" " + choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                log_q = reader.model(torch.tensor([asked + continuation])).logits[0].log_softmax(-1)
            likely[choice] = sum(log_q[len(asked) - 1 + i, token].item() for i, token in enumerate(continuation))
        right.append(max(likely, key=lambda choice: likely[choice]) == document["answer"])
    found = artifact.manifest.summary["embedded"]
    mean = sum(right) / 12
    assert 0 < mean < 1
    assert found["value"] == pytest.approx(mean)
    assert found["stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / 11))
    assert found["documents"] == 12
    samples = artifact.table().to_pylist()
    assert [bool(row["score"]) for row in samples] == right
    assert "What" in samples[0]["prompt"] or "Where" in samples[0]["prompt"]


def test_closeness_is_what_bare_forwards_say(heldout: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    artifact = evaluate(str(student), tmp_path / "r", EvalConfig(limit=2), heldout=heldout)
    readers = load_model(str(student)), load_model(str(teacher))
    divergence, agreement, entropies = [], [], []
    for row in read(heldout / "rollouts", "rollouts").table().to_pylist():
        q, p = (bare_logits(reader, row) for reader in readers)
        divergence.append(torch.nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(-1))
        agreement.append(q.argmax(-1) == p.argmax(-1))
        entropies.append(entropy(q))
    found = artifact.manifest.summary["heldout"]
    tokens = torch.cat(divergence)
    assert found["tokens"] == len(tokens)
    assert found["kl"] == pytest.approx(tokens.mean().item(), rel=1e-4)
    assert found["agreement"] == pytest.approx(torch.cat(agreement).float().mean().item())
    assert found["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)
    residuals = [(d.sum() - tokens.mean() * len(d)).item() for d in divergence]  # of a ratio estimator, by response
    spread = sum(r * r for r in residuals) * len(residuals) / (len(residuals) - 1)
    assert found["kl_stderr"] == pytest.approx(math.sqrt(spread) / len(tokens), rel=1e-3)
    assert found["answer"]


def test_the_teacher_has_no_divergence_from_itself(heldout: Path, teacher: Path, tmp_path: Path) -> None:
    artifact = evaluate(str(teacher), tmp_path / "r", EvalConfig(limit=2), heldout=heldout)
    found = artifact.manifest.summary["heldout"]
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["agreement"] == 1
    assert found["entropy"] == pytest.approx(found["teacher_entropy"])


def test_a_finished_benchmark_is_not_run_again(
    student: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "_run", broken)
    with pytest.raises(KeyboardInterrupt):
        evaluate(str(student), tmp_path / "r", EvalConfig(limit=2), heldout=heldout)
    monkeypatch.undo()
    monkeypatch.setattr(stage, "measure", broken)  # measured before the interruption
    artifact = evaluate(str(student), tmp_path / "r", EvalConfig(limit=2), heldout=heldout)
    assert set(artifact.manifest.summary) == {"heldout", "embedded"}


def test_light_heldout_scores_are_refused(heldout: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(heldout / "rollouts", tmp_path / "h" / "rollouts")
    config = ScoreConfig(k=4, signal="ranks")
    score(tmp_path / "h" / "rollouts", str(student), str(teacher), tmp_path / "h" / "scores", config)
    with pytest.raises(InputError, match="'ranks'"):
        evaluate(str(student), tmp_path / "r", EvalConfig(limit=2), heldout=tmp_path / "h")
    assert not (tmp_path / "r").exists()


def test_real_rows_of_gsm8k_and_sciq(student: Path, shared: Path, tmp_path: Path) -> None:
    config = EvalConfig(tasks=("gsm8k", "sciq"), limit=2, max_length=512)
    artifact = evaluate(str(student), tmp_path / "r", config, data=shared / "benchmarks")
    summary = artifact.manifest.summary
    assert summary["gsm8k"]["metric"] == "exact_match,flexible-extract"
    assert set(summary["gsm8k"]["others"]) == {"exact_match,strict-match"}
    assert summary["sciq"]["metric"] == "acc,none"
    rows = artifact.table().to_pylist()
    gsm8k = [row for row in rows if row["task"] == "gsm8k"]
    assert len(gsm8k) == 4  # two documents, two filters
    assert gsm8k[0]["prompt"].count("Question:") == 6  # five shots
    assert "Question:" in next(row["prompt"] for row in rows if row["task"] == "sciq")
    again = evaluate(str(student), tmp_path / "again", config, data=shared / "benchmarks")
    assert again.manifest.summary == summary


def test_a_stock_task_keeps_its_own_data_without_a_folder() -> None:
    overlay = BENCHMARKS["gsm8k"].overlay(None)
    assert overlay["num_fewshot"] == 5
    assert "dataset_path" not in overlay
    assert Path(overlay["include"]).is_file()
