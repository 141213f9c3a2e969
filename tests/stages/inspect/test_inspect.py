"""What is found is what the artifact holds, chosen by the core's rules; by id, nothing else is read."""

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
from tsdkd.stages.inspect.response import LEVELS, Response
from tsdkd.stages.inspect.stage import inspect_all, inspect_models, inspect_scores
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.score.stage import score

Rows = list[dict[str, Any]]


class Listening(SilentObserver):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.done = 0

    def info(self, message: str) -> None:
        self.said.append(message)

    @contextmanager
    def progress(self, what: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
        def advance(count: int) -> None:
            self.done += count

        yield advance
        assert self.done == total


@pytest.fixture(scope="module")
def rows(run: Path) -> Rows:
    """Rollouts and scores, joined."""
    tables = [read_artifact(run / kind, kind).table().to_pylist() for kind in ("rollouts", "scores")]
    return [one | other for one, other in zip(*tables, strict=True)]


def look(run: Path, **config: Any) -> Response:
    return inspect_scores(run / "scores", InspectConfig(**config))


def weights(row: dict[str, Any], objective: TSDKDConfig, fraction: float | None = None) -> dict[str, list[float]]:
    """As the core has them."""
    student, teacher = (torch.tensor([row[f"{who}_entropy"]]) for who in ("student", "teacher"))
    found = select(student, teacher, torch.ones_like(student, dtype=torch.bool), objective, fraction)
    return {name: getattr(found, name)[0].tolist() for name in ("ranking", "entropy", "gate")}


@pytest.mark.parametrize("more", [{}, {"opener": 0.4, "em_ratio": 0.3, "tau": 0.2}, {"gate": False, "opener": 1.0}])
def test_a_responses_tokens_are_the_artifacts_and_taught_by_the_cores_rules(
    run: Path, rows: Rows, more: dict[str, Any]
) -> None:
    tokenizer = byte_tokenizer().backend_tokenizer
    for row in rows:
        found = look(run, sample_id=row["sample_id"], **more)
        assert [token.position for token in found.tokens] == list(range(1, len(row["response_ids"]) + 1))
        assert [token.before.student_entropy for token in found.tokens] == row["student_entropy"]
        assert [token.before.teacher_entropy for token in found.tokens] == row["teacher_entropy"]
        for i, token in enumerate(found.tokens):
            ids, ranks = row["candidates"][4 * i : 4 * i + 4], row["ranks"][4 * i : 4 * i + 4]
            assert [one.rank - 1 for one in token.before.candidates] == ranks
            names = [one.text for one in token.before.candidates]
            readable = [(name, tokenizer.decode([id_])) for name, id_ in zip(names, ids, strict=True) if len(name) == 1]
            assert all(name == text for name, text in readable)
            assert token.before.level == sum(row["student_entropy"][i] >= bound for bound in LEVELS)
        expected = weights(row, TSDKDConfig(k=4, **more))
        assert [token.opener for token in found.tokens] == [weight > 0 for weight in expected["ranking"]]
        assert [token.uncertain for token in found.tokens] == [weight > 0 for weight in expected["entropy"]]
        assert [token.gate for token in found.tokens] == pytest.approx(expected["gate"], abs=1e-6)


def test_fewer_candidates_are_ranked_among_themselves(run: Path, rows: Rows) -> None:
    found = look(run, sample_id=rows[0]["sample_id"], k=2)
    for i, token in enumerate(found.tokens):
        first, second = rows[0]["ranks"][4 * i : 4 * i + 2]
        assert [one.rank for one in token.before.candidates] == ([1, 2] if first < second else [2, 1])
        assert token.before.agreement == (1 if first < second else -1)
    with pytest.raises(InputError, match="--k is 5, but only 4 candidates were recorded"):
        look(run, k=5)


def test_the_ways_to_choose(run: Path, rows: Rows) -> None:
    gaps = [np.mean(row["student_entropy"]) - np.mean(row["teacher_entropy"]) for row in rows]
    openers = [sum(weight > 0 for weight in weights(row, TSDKDConfig(opener=0.3))["ranking"]) for row in rows]
    assert look(run, sample_id="largest-gap").sample_id == rows[int(np.argmax(gaps))]["sample_id"]
    assert look(run, sample_id="longest-opener", opener=0.3).sample_id == rows[int(np.argmax(openers))]["sample_id"]
    drawn = [look(run, seed=seed).sample_id for seed in range(5)]
    assert drawn == [look(run, seed=seed).sample_id for seed in range(5)]
    assert len(set(drawn)) > 1


def test_an_adaptive_opener_depends_on_the_responses_before(run: Path, rows: Rows) -> None:
    adaptive = AdaptiveOpener()
    for row in rows:
        student, teacher = (torch.tensor([row[f"{who}_entropy"]]) for who in ("student", "teacher"))
        expected = adaptive.fraction(student, teacher, torch.ones_like(student, dtype=torch.bool)).item()
        assert look(run, sample_id=row["sample_id"], opener="adaptive").fraction == expected


def test_by_id_nothing_else_of_the_scores_is_read(run: Path, rows: Rows, tmp_path: Path) -> None:
    """All other rows, and the teacher's hidden states, are overwritten with zeros; nothing is noticed."""
    shutil.copytree(run, tmp_path / "run")
    place, expected = tmp_path / "run", look(run, sample_id=rows[5]["sample_id"])
    needed = {"student_entropy.list.element", "teacher_entropy.list.element"}
    needed |= {"candidates.list.element", "ranks.list.element"}
    file = place / "scores" / "part-00001.parquet"  # four responses a part: row 1 of the second
    metadata, content = pq.read_metadata(file), bytearray(file.read_bytes())
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            one = metadata.row_group(group).column(column)
            if group != 1 or one.path_in_schema not in needed:
                start = one.dictionary_page_offset or one.data_page_offset
                content[start : start + one.total_compressed_size] = bytes(one.total_compressed_size)
    file.write_bytes(content)
    assert look(place, sample_id=rows[5]["sample_id"]) == expected
    with pytest.raises(ArtifactError, match=r"part-00001\.parquet cannot be read"):
        look(place, sample_id=rows[4]["sample_id"])


def test_a_checkpoint_says_what_was_selected_if_it_is_of_these_scores(run: Path, tmp_path: Path) -> None:
    trained = TSDKDConfig(opener=0.5, em_ratio=0.3, tau=2.0, k=3)
    scores = read_artifact(run / "scores", "scores")
    for name, parents in (("own", (scores.as_parent_of(tmp_path / "own"),)), ("foreign", ())):
        manifest = Manifest("checkpoint", {"objective": asdict(trained)}, 0, parents)
        with Writer.open(tmp_path / name, manifest) as writer:
            writer.finish({})
    told = Listening()
    own = inspect_scores(scores.path, InspectConfig(tau=1.0), checkpoint=tmp_path / "own", observer=told)
    assert own.objective == TSDKDConfig(opener=0.5, em_ratio=0.3, tau=1.0, k=3)
    assert told.said == [f"What is taught is as {tmp_path / 'own'} was trained, where no option says otherwise."]
    foreign = inspect_scores(scores.path, InspectConfig(), checkpoint=tmp_path / "foreign", observer=told)
    assert foreign.objective == TSDKDConfig(k=4)
    assert told.said[1:] == [
        f"{tmp_path / 'foreign'} was not made from these scores: what is taught is as in the paper."
    ]


@pytest.mark.parametrize("missing", ["alpha", "em_weight", "direct_weight"])
def test_what_has_no_term_is_not_taught(run: Path, tmp_path: Path, missing: str) -> None:
    scores = read_artifact(run / "scores", "scores")
    trained = asdict(replace(TSDKDConfig(k=4), **{missing: 0.0}))
    with Writer.open(
        tmp_path / "c", Manifest("checkpoint", {"objective": trained}, 0, (scores.as_parent_of(tmp_path / "c"),))
    ) as writer:
        writer.finish({})
    found = inspect_scores(scores.path, InspectConfig(), checkpoint=tmp_path / "c")
    marked = {
        "alpha": found.opener + sum(token.opener for token in found.tokens),
        "em_weight": sum(token.uncertain for token in found.tokens),
        "direct_weight": sum(token.gate for token in found.tokens),
    }
    names = {"alpha": "opener (c)", "em_weight": "entropy minimised", "direct_weight": "gate"}
    assert {name for name, sum_ in marked.items() if not sum_} == {missing}
    assert {name for name, value in found.facts if value.startswith("none")} == {names[missing]}
    everything = dict(inspect_all(scores.path, InspectConfig(), tmp_path / "c").facts)
    assert ("openers" in everything) == (missing != "alpha")
    assert everything["gate"].startswith("none") == (missing == "direct_weight")


def test_models_read_what_was_scored_and_what_changed(run: Path, rows: Rows, student: Path, teacher: Path) -> None:
    """Without scores the same numbers; after training with none, the same as before."""
    sample = rows[3]["sample_id"]
    config = InspectConfig(sample_id=sample, k=4)
    recorded = inspect_scores(run / "scores", config, after=str(student))
    live = inspect_models(run / "rollouts", config, str(student), str(teacher), str(teacher))
    assert [t.text for t in live.tokens] == [t.text for t in recorded.tokens]
    for one, other in zip(recorded.tokens, live.tokens, strict=True):
        assert one.after is not None
        for seen in (one.after, other.before):
            assert seen.student_entropy == pytest.approx(one.before.student_entropy, abs=1e-4)
            assert seen.candidates == one.before.candidates
        assert other.after is not None
        assert other.after.student_entropy == other.after.teacher_entropy  # it is the teacher
        assert [c.rank for c in other.after.candidates] == [1, 2, 3, 4]
        assert other.after.agreement == 1


def test_models_of_two_families(run: Path, student: Path, stranger: Path) -> None:
    with pytest.raises(InputError, match="different tokenizers"):
        inspect_models(run / "rollouts", InspectConfig(), str(student), str(stranger))
    with pytest.raises(InputError, match="known of scores alone"):
        inspect_models(run / "rollouts", InspectConfig(sample_id="largest-gap"), str(student), str(stranger))


def test_another_tokenizer_is_said(run: Path, stranger: Path) -> None:
    told = Listening()
    inspect_scores(run / "scores", InspectConfig(), student=str(stranger), observer=told)
    assert "is another than the recorded one" in told.said[0]


@pytest.mark.parametrize("opener", [0.3, "adaptive"])
def test_aggregates_are_sums_over_the_artifact(run: Path, rows: Rows, opener: Any) -> None:
    told, objective = Listening(), TSDKDConfig(opener=opener, k=3)
    found = inspect_all(run / "scores", InspectConfig(opener=opener, k=3), observer=told)
    assert told.done == len(rows)
    chosen = [look(run, sample_id=row["sample_id"], opener=opener, k=3) for row in rows]
    tokens = [token for response in chosen for token in response.tokens]
    assert (found.responses, found.tokens) == (len(rows), len(tokens))
    for who, means in zip(("student", "teacher"), found.by_position, strict=True):
        for position, mean in enumerate(means):
            there = [row[f"{who}_entropy"][position] for row in rows if len(row["response_ids"]) > position]
            assert mean == pytest.approx(np.mean(there))
            assert found.reached[position] == len(there)
    assert sorted(found.opener_lengths.elements()) == sorted(response.opener for response in chosen)
    assert sum(count for _, count in found.lengths) == len(rows)
    assert sorted(found.fractions.elements()) == sorted(response.fraction for response in chosen)
    shares = [
        sum(t.before.student_entropy for t in r.tokens if t.opener) / sum(t.before.student_entropy for t in r.tokens)
        for r in chosen
    ]
    assert found.opener_share / len(rows) == pytest.approx(np.mean(shares))
    assert found.gates.counts.tolist() == np.histogram([t.gate for t in tokens], 10, (0, 1))[0].tolist()
    assert found.gates.mean == pytest.approx(np.mean([t.gate for t in tokens]))
    assert found.agreement.mean == pytest.approx(np.mean([t.before.agreement for t in tokens]))
    assert found.opener_agreement == pytest.approx(sum(t.before.agreement for t in tokens if t.opener))
    assert found.same_favourite == sum(t.before.candidates[0].rank == 1 for t in tokens)
    assert not found.mass.counts.any()
    assert found.objective == objective


def test_long_openers_share_bars(run: Path) -> None:
    found = inspect_all(run / "scores", InspectConfig())
    found.opener_lengths.clear()
    found.opener_lengths.update({1: 3, 2: 1, 3: 4, 24: 2})
    assert found.lengths[:3] == [(1, 4), (3, 4), (5, 0)]
    assert found.lengths[-1] == (23, 2)
    assert len(found.lengths) == 12


def test_captured_mass_is_what_score_reported(run: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    config = ScoreConfig(signal="topk", k=4, top_k=8)
    scores: Artifact = score(run / "rollouts", str(student), str(teacher), tmp_path / "scores", config)
    found = inspect_all(scores.path, InspectConfig())
    assert found.mass.mean == pytest.approx(scores.manifest.summary["captured_mass"])
    assert found.mass.counts.sum() == found.tokens
