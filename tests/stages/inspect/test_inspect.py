"""Inspection shows the artifact's values and the core's selection; by id, it reads one response."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.helpers.models import byte_tokenizer
from tsdkd.artifacts.manifest import Manifest
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.artifacts.writer import Writer
from tsdkd.core import AdaptiveOpener, TSDKDConfig, select
from tsdkd.errors import ArtifactError, InputError
from tsdkd.stages.config.inspect import InspectConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.inspect.response import ENTROPY_LEVELS, InspectedResponse
from tsdkd.stages.inspect.stage import inspect_all, inspect_models, inspect_scores
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.score.stage import score

JoinedRows = list[dict[str, Any]]


class RecordingObserver(SilentObserver):
    """Keeps messages and counts progress."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.done = 0

    def info(self, message: str) -> None:
        self.messages.append(message)

    @contextmanager
    def progress(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
        def advance(count: int) -> None:
            self.done += count

        yield advance
        assert self.done == total


@pytest.fixture(scope="module")
def rows(run: Path) -> JoinedRows:
    """Rollouts and scores, joined."""
    tables = [read_artifact(run / kind, kind).table().to_pylist() for kind in ("rollouts", "scores")]
    return [rollout | scores for rollout, scores in zip(*tables, strict=True)]


def inspect_run(run: Path, **config: Any) -> InspectedResponse:
    return inspect_scores(run / "scores", InspectConfig(**config))


def core_weights(row: dict[str, Any], objective: TSDKDConfig, fraction: float | None = None) -> dict[str, list[float]]:
    """The token weights that the core selects."""
    student, teacher = (torch.tensor([row[f"{role}_entropy"]]) for role in ("student", "teacher"))
    selected = select(student, teacher, torch.ones_like(student, dtype=torch.bool), objective, fraction)
    return {name: getattr(selected, name)[0].tolist() for name in ("indirect", "entropy", "gate")}


@pytest.mark.parametrize("settings", [{}, {"opener": 0.4, "em_ratio": 0.3, "tau": 0.2}, {"gate": False, "opener": 1.0}])
def test_tokens_match_the_artifact_and_the_core_selection(
    run: Path, rows: JoinedRows, settings: dict[str, Any]
) -> None:
    tokenizer = byte_tokenizer().backend_tokenizer
    for row in rows:
        response = inspect_run(run, sample_id=row["sample_id"], **settings)
        assert [token.position for token in response.tokens] == list(range(1, len(row["response_ids"]) + 1))
        assert [token.before.student_entropy for token in response.tokens] == row["student_entropy"]
        assert [token.before.teacher_entropy for token in response.tokens] == row["teacher_entropy"]
        for i, token in enumerate(response.tokens):
            ids, ranks = row["candidates"][4 * i : 4 * i + 4], row["ranks"][4 * i : 4 * i + 4]
            assert [candidate.rank - 1 for candidate in token.before.candidates] == ranks
            names = [candidate.text for candidate in token.before.candidates]
            readable = [(name, tokenizer.decode([id_])) for name, id_ in zip(names, ids, strict=True) if len(name) == 1]
            assert all(name == text for name, text in readable)
            assert token.before.level == sum(row["student_entropy"][i] >= bound for bound in ENTROPY_LEVELS)
        expected = core_weights(row, TSDKDConfig(k=4, **settings))
        assert [token.in_opener for token in response.tokens] == [weight > 0 for weight in expected["indirect"]]
        assert [token.in_entropy_term for token in response.tokens] == [weight > 0 for weight in expected["entropy"]]
        assert [token.gate for token in response.tokens] == pytest.approx(expected["gate"], abs=1e-6)


def test_a_smaller_k_ranks_fewer_candidates(run: Path, rows: JoinedRows) -> None:
    response = inspect_run(run, sample_id=rows[0]["sample_id"], k=2)
    for i, token in enumerate(response.tokens):
        first, second = rows[0]["ranks"][4 * i : 4 * i + 2]
        assert [candidate.rank for candidate in token.before.candidates] == ([1, 2] if first < second else [2, 1])
        assert token.before.agreement == (1 if first < second else -1)
    with pytest.raises(InputError, match="--k is 5, but only 4 candidates were recorded"):
        inspect_run(run, k=5)


def test_a_response_is_chosen_by_gap_by_opener_or_at_random(run: Path, rows: JoinedRows) -> None:
    gaps = [np.mean(row["student_entropy"]) - np.mean(row["teacher_entropy"]) for row in rows]
    openers = [sum(weight > 0 for weight in core_weights(row, TSDKDConfig(opener=0.3))["indirect"]) for row in rows]
    assert inspect_run(run, sample_id="largest-gap").sample_id == rows[int(np.argmax(gaps))]["sample_id"]
    assert (
        inspect_run(run, sample_id="longest-opener", opener=0.3).sample_id == rows[int(np.argmax(openers))]["sample_id"]
    )
    drawn = [inspect_run(run, seed=seed).sample_id for seed in range(5)]
    assert drawn == [inspect_run(run, seed=seed).sample_id for seed in range(5)]
    assert len(set(drawn)) > 1


def test_an_adaptive_opener_depends_on_earlier_responses(run: Path, rows: JoinedRows) -> None:
    adaptive = AdaptiveOpener()
    for row in rows:
        student, teacher = (torch.tensor([row[f"{role}_entropy"]]) for role in ("student", "teacher"))
        expected = adaptive.fraction(student, teacher, torch.ones_like(student, dtype=torch.bool)).item()
        assert inspect_run(run, sample_id=row["sample_id"], opener="adaptive").opener_fractions == [expected]


def test_by_id_one_row_group_of_the_scores_is_read(run: Path, rows: JoinedRows, tmp_path: Path) -> None:
    """The result stays the same after all other rows and the teacher's hidden states are overwritten with zeros.

    The ids of all rows are read, to find the one.
    """
    shutil.copytree(run, tmp_path / "run")
    copy, expected = tmp_path / "run", inspect_run(run, sample_id=rows[5]["sample_id"])
    needed = {"student_entropy.list.element", "teacher_entropy.list.element"}
    needed |= {"candidates.list.element", "ranks.list.element"}
    file = copy / "scores" / "part-00001.parquet"  # parts have four responses; row 5 is row 1 of the second part
    metadata, content = pq.read_metadata(file), bytearray(file.read_bytes())
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            if chunk.path_in_schema != "sample_id" and (group != 1 or chunk.path_in_schema not in needed):
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    file.write_bytes(content)
    assert inspect_run(copy, sample_id=rows[5]["sample_id"]) == expected
    with pytest.raises(ArtifactError, match=r"part-00001\.parquet cannot be read"):
        inspect_run(copy, sample_id=rows[4]["sample_id"])


def test_the_objective_comes_from_a_checkpoint_trained_on_these_scores(run: Path, tmp_path: Path) -> None:
    trained = TSDKDConfig(opener=0.5, em_ratio=0.3, tau=2.0, k=3)
    scores = read_artifact(run / "scores", "scores")
    for name, parents in (("own", (scores.as_parent_of(tmp_path / "own"),)), ("foreign", ())):
        manifest = Manifest("checkpoint", {"objective": asdict(trained)}, 0, parents)
        with Writer.open(tmp_path / name, manifest) as writer:
            writer.finish({})
    observer = RecordingObserver()
    own = inspect_scores(scores.path, InspectConfig(tau=1.0), checkpoint=tmp_path / "own", observer=observer)
    assert own.objective == TSDKDConfig(opener=0.5, em_ratio=0.3, tau=1.0, k=3)
    assert observer.messages == [f"Settings without an option are those that trained {tmp_path / 'own'}."]
    foreign = inspect_scores(scores.path, InspectConfig(), checkpoint=tmp_path / "foreign", observer=observer)
    assert foreign.objective == TSDKDConfig(k=4)
    assert observer.messages[1:] == [
        f"{tmp_path / 'foreign'} was not trained on these scores; settings without an option are the paper's."
    ]


@pytest.mark.parametrize("missing", ["alpha", "em_weight", "direct_weight"])
def test_a_term_of_weight_zero_selects_no_tokens(run: Path, tmp_path: Path, missing: str) -> None:
    scores = read_artifact(run / "scores", "scores")
    trained = asdict(replace(TSDKDConfig(k=4), **{missing: 0.0}))
    with Writer.open(
        tmp_path / "c", Manifest("checkpoint", {"objective": trained}, 0, (scores.as_parent_of(tmp_path / "c"),))
    ) as writer:
        writer.finish({})
    response = inspect_scores(scores.path, InspectConfig(), checkpoint=tmp_path / "c")
    marked = {
        "alpha": response.opener_length + sum(token.in_opener for token in response.tokens),
        "em_weight": sum(token.in_entropy_term for token in response.tokens),
        "direct_weight": sum(token.gate for token in response.tokens),
    }
    names = {"alpha": "opener", "em_weight": "entropy term", "direct_weight": "gate"}
    assert {name for name, total in marked.items() if not total} == {missing}
    assert {name for name, value in response.summary if value.startswith("none")} == {names[missing]}
    summary = dict(inspect_all(scores.path, InspectConfig(), tmp_path / "c").summary)
    assert ("opener length" in summary) == (missing != "alpha")
    assert summary["gate"].startswith("none") == (missing == "direct_weight")


def test_models_reproduce_the_recorded_scores(run: Path, rows: JoinedRows, student: Path, teacher: Path) -> None:
    """An `after` that equals the student changes nothing; the teacher as `after` agrees with itself."""
    sample = rows[3]["sample_id"]
    config = InspectConfig(sample_id=sample, k=4)
    recorded = inspect_scores(run / "scores", config, after=str(student))
    loaded = inspect_models(run / "rollouts", config, str(student), str(teacher), str(teacher))
    assert [t.text for t in loaded.tokens] == [t.text for t in recorded.tokens]
    for expected, token in zip(recorded.tokens, loaded.tokens, strict=True):
        assert expected.after is not None
        for scores in (expected.after, token.before):
            assert scores.student_entropy == pytest.approx(expected.before.student_entropy, abs=1e-4)
            assert scores.candidates == expected.before.candidates
        assert token.after is not None
        assert token.after.student_entropy == token.after.teacher_entropy
        assert [candidate.rank for candidate in token.after.candidates] == [1, 2, 3, 4]
        assert token.after.agreement == 1


def test_models_with_different_tokenizers_are_refused(run: Path, student: Path, other_family: Path) -> None:
    with pytest.raises(InputError, match="different tokenizers"):
        inspect_models(run / "rollouts", InspectConfig(), str(student), str(other_family))
    with pytest.raises(InputError, match="largest-gap, longest-opener and the adaptive opener need scores"):
        inspect_models(run / "rollouts", InspectConfig(sample_id="largest-gap"), str(student), str(other_family))


def test_a_different_tokenizer_is_reported(run: Path, other_family: Path) -> None:
    observer = RecordingObserver()
    inspect_scores(run / "scores", InspectConfig(), student=str(other_family), observer=observer)
    assert "differs from the recorded one" in observer.messages[0]


@pytest.mark.parametrize("opener", [0.3, "adaptive"])
def test_aggregates_are_sums_over_the_artifact(run: Path, rows: JoinedRows, opener: Any) -> None:
    observer, objective = RecordingObserver(), TSDKDConfig(opener=opener, k=3)
    aggregate = inspect_all(run / "scores", InspectConfig(opener=opener, k=3), observer=observer)
    assert observer.done == len(rows)
    responses = [inspect_run(run, sample_id=row["sample_id"], opener=opener, k=3) for row in rows]
    tokens = [token for response in responses for token in response.tokens]
    assert (aggregate.responses, aggregate.tokens) == (len(rows), len(tokens))
    by_position = aggregate.mean_entropy_by_position, aggregate.standard_errors_by_position
    for role, means, errors in zip(("student", "teacher"), *by_position, strict=True):
        for position, (mean, error) in enumerate(zip(means, errors, strict=True)):
            entropies = [row[f"{role}_entropy"][position] for row in rows if len(row["response_ids"]) > position]
            assert mean == pytest.approx(np.mean(entropies))
            count = len(entropies)
            known = np.std(entropies, ddof=1) / count**0.5 if count > 1 else np.nan
            assert error == pytest.approx(known, rel=1e-4, nan_ok=True)
            assert aggregate.responses_by_position[position] == len(entropies)
    assert sorted(aggregate.opener_lengths.elements()) == sorted(response.opener_length for response in responses)
    assert sum(count for _, count in aggregate.opener_length_bins) == len(rows)
    assert sorted(aggregate.opener_fractions.elements()) == sorted(
        response.opener_fractions[0] for response in responses
    )
    fractions = [
        sum(t.before.student_entropy for t in r.tokens if t.in_opener) / sum(t.before.student_entropy for t in r.tokens)
        for r in responses
    ]
    assert aggregate.opener_entropy_fractions / len(rows) == pytest.approx(np.mean(fractions))
    assert aggregate.gates.counts.tolist() == np.histogram([t.gate for t in tokens], 10, (0, 1))[0].tolist()
    assert aggregate.gates.mean == pytest.approx(np.mean([t.gate for t in tokens]))
    assert aggregate.agreement.mean == pytest.approx(np.mean([t.before.agreement for t in tokens]))
    assert aggregate.opener_agreement == pytest.approx(sum(t.before.agreement for t in tokens if t.in_opener))
    assert aggregate.same_best == sum(t.before.candidates[0].rank == 1 for t in tokens)
    assert not aggregate.captured_mass.counts.any()
    assert aggregate.objective == objective


def test_lengths_of_long_openers_are_binned(run: Path) -> None:
    aggregate = inspect_all(run / "scores", InspectConfig())
    aggregate.opener_lengths.clear()
    aggregate.opener_lengths.update({1: 3, 2: 1, 3: 4, 24: 2})
    assert aggregate.opener_length_bins[:3] == [(1, 4), (3, 4), (5, 0)]
    assert aggregate.opener_length_bins[-1] == (23, 2)
    assert len(aggregate.opener_length_bins) == 12


def test_captured_mass_equals_the_summary_of_score(run: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    config = ScoreConfig(signal="topk", k=4, top_k=8)
    scores: Artifact = score(run / "rollouts", str(student), str(teacher), tmp_path / "scores", config)
    aggregate = inspect_all(scores.path, InspectConfig())
    assert aggregate.captured_mass.mean == pytest.approx(scores.manifest.summary["captured_mass"])
    assert aggregate.captured_mass.counts.sum() == aggregate.tokens
