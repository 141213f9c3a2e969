"""score with several teachers: each row of scores is the one that its own teacher alone gives."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import refuse, run
from tests.helpers.models import save_tiny_model
from tests.helpers.readers import ReadingProcess
from tests.helpers.scored_runs import FIELDS, rollouts_of_one, sampled_run
from tests.helpers.teacher_server import FakeServer, random_model, serve
from tests.helpers.training import RecordingObserver
from tsdkd.artifacts.reader import Artifact, read_artifact, verify_artifact
from tsdkd.artifacts.schemas import OPTIONAL, SCHEMAS
from tsdkd.artifacts.writer import TableWriter, Writer
from tsdkd.errors import ArtifactError, InputError, TsdkdError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.inspect import InspectConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.engines import reader_check, vllm_reader
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.inspect.stage import inspect_all, inspect_scores
from tsdkd.stages.parallel.part_files import WrittenPart
from tsdkd.stages.score import loop, pairs, scorer, stage
from tsdkd.stages.score.served import score_served
from tsdkd.stages.score.stage import score
from tsdkd.stages.teacher_server import connection

Contents = Callable[[Path], dict[str, bytes]]
Rows = dict[str, dict[str, Any]]
CONFIG = ScoreConfig(k=4, top_k=8, batch_tokens=256)
SERVED = ScoreConfig(signal="topk", k=4, top_k=64)
COLUMNS = [*SCHEMAS["scores"].names, *(name for name in OPTIONAL["scores"].names if name != "teacher")]


@pytest.fixture(scope="module")
def teachers(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two teachers of two widths and precisions."""
    other = tmp_path_factory.mktemp("teachers") / "other"
    save_tiny_model(other, seed=7, layers=3, width=64, dtype=torch.bfloat16)
    return {"math": str(teacher), "code": str(other)}


@pytest.fixture(scope="module")
def rollouts(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sampled_run(tmp_path_factory.mktemp("run"), student) / "rollouts"


@pytest.fixture(scope="module")
def scores(rollouts: Path, student: Path, teachers: dict[str, str]) -> Path:
    return score(rollouts, str(student), teachers, rollouts.parent / "scores", CONFIG).path


def rows_of(scores: Artifact) -> Rows:
    return {row["sample_id"]: row for row in scores.table(COLUMNS).to_pylist()}


@pytest.fixture(scope="module")
def alone(rollouts: Path, student: Path, teachers: dict[str, str]) -> dict[str, Artifact]:
    """What each teacher alone gives for the responses of its prompts."""
    run = rollouts.parent
    own = {name: rollouts_of_one(rollouts, name, run / f"rollouts-{name}") for name in teachers}
    return {name: score(own[name], str(student), teachers[name], run / f"scores-{name}", CONFIG) for name in teachers}


def test_each_row_is_the_one_of_its_teacher_alone(rollouts: Path, scores: Path, alone: dict[str, Artifact]) -> None:
    """To the bit, in parts of both teachers and of one."""
    several = read_artifact(scores, "scores")
    expected = rows_of(alone["math"]) | rows_of(alone["code"])
    assert len(expected) == len(FIELDS)
    assert rows_of(several) == expected
    order = read_artifact(rollouts, "rollouts").table(["sample_id"])["sample_id"].to_pylist()
    for part in several.tables:
        places = [order.index(name) for name in several.read_part(part, ["sample_id"])["sample_id"].to_pylist()]
        assert places == sorted(places)
    named = zip(
        *(read_artifact(rollouts, "rollouts").table(["sample_id", "teacher"]).to_pydict().values()), strict=True
    )
    recorded = several.table(["sample_id", "teacher"]).to_pydict().values()
    assert dict(zip(*recorded, strict=True)) == dict(named)
    source = OfflineSource(rollouts, several.path)
    assert [source[i]["sample_id"] for i in range(10)] == [
        row["sample_id"] for row in read_artifact(rollouts, "rollouts").table(["sample_id"]).to_pylist()
    ]
    assert [source[i]["teacher"] for i in range(10)] == FIELDS


def test_parts_and_summary_are_by_teacher(scores: Path, teachers: dict[str, str]) -> None:
    manifest, _ = verify_artifact(scores)
    mixed = [f"part-0000{part}-{teacher}.parquet" for part in (0, 1) for teacher in (0, 1)]
    heads = ["teacher_head-0.safetensors", "teacher_head-1.safetensors"]
    assert [part.file for part in manifest.parts] == [*mixed, "part-00002-0.parquet", *heads]
    assert [model.role for model in manifest.models] == ["student", "teacher:code", "teacher:math"]
    assert manifest.config["teacher_by"] == "field"
    summary = manifest.summary
    by_teacher = summary["teachers"]
    assert {name: values["responses"] for name, values in by_teacher.items()} == {"code": 6, "math": 4}
    assert sum(values["response_tokens"] for values in by_teacher.values()) == summary["response_tokens"]
    table = read_artifact(scores, "scores").table(["teacher", "teacher_entropy"]).to_pylist()
    for name in teachers:
        entropies = [value for row in table if row["teacher"] == name for value in row["teacher_entropy"]]
        assert by_teacher[name]["teacher_entropy"] == pytest.approx(sum(entropies) / len(entropies))
    weighted = sum(values["response_tokens"] * values["teacher_entropy"] for values in by_teacher.values())
    assert summary["teacher_entropy"] == pytest.approx(weighted / summary["response_tokens"])


def test_each_teacher_is_loaded_once_and_a_cut_run_ends_with_the_same_bytes(
    rollouts: Path,
    student: Path,
    teachers: dict[str, str],
    scores: Path,
    tmp_path: Path,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded, load, close = list[str](), pairs.load_model, scorer.Scorer._close

    def recording(name: str, *arguments: Any, **settings: Any) -> Any:
        loaded.append(name)
        return load(name, *arguments, **settings)

    def cut(own: scorer.Scorer, writer: TableWriter, file: str, path: Path) -> WrittenPart:
        if file == "part-00001-1.parquet":
            raise OSError("the disk is gone")
        return close(own, writer, file, path)

    monkeypatch.setattr(pairs, "load_model", recording)
    monkeypatch.setattr(scorer.Scorer, "_close", cut)
    output = rollouts.parent / "cut"
    with pytest.raises(OSError, match="the disk is gone"):
        score(rollouts, str(student), teachers, output, CONFIG)
    assert loaded == [str(student), teachers["code"], teachers["math"]]
    monkeypatch.setattr(scorer.Scorer, "_close", close)
    score(rollouts, str(student), teachers, output, replace(CONFIG, teacher_by="field"))
    assert loaded[3:] == [str(student), teachers["math"]]
    assert contents(output) == contents(scores)


def test_a_head_that_is_missing_is_written_before_the_scores_are_complete(
    rollouts: Path, student: Path, teachers: dict[str, str], scores: Path, contents: Contents
) -> None:
    """All rows of the teacher are complete."""
    output = rollouts.parent / "headless"
    whole = read_artifact(scores, "scores").manifest
    with Writer.open(output, replace(whole, parts=(), state="partial", summary={})) as writer:
        for part in whole.parts:
            if part.file != "teacher_head-1.safetensors":
                writer.temporary_path(part.file).write_bytes((scores / part.file).read_bytes())
                writer.add_file(part.file, part.rows)
    score(rollouts, str(student), teachers, output, CONFIG)
    assert contents(output) == contents(scores)


def test_inspection_finds_the_scores_of_each_sample(rollouts: Path, scores: Path, teachers: dict[str, str]) -> None:
    rows = read_artifact(rollouts, "rollouts").table(["sample_id", "teacher"]).slice(0, 3).to_pylist()
    expected = rows_of(read_artifact(scores, "scores"))
    for sample_id, name in [(row["sample_id"], row["teacher"]) for row in rows]:
        shown = inspect_scores(scores, InspectConfig(sample_id=sample_id, k=4), rollouts)
        entropies = [token.before.teacher_entropy for token in shown.tokens]
        assert entropies == pytest.approx(expected[sample_id]["teacher_entropy"])
        assert ("teacher", name) in shown.summary
    assert inspect_all(scores, InspectConfig(k=4)).responses == 10


def test_the_source_names_the_teacher_where_the_rollouts_record_no_column(
    rollouts: Path, student: Path, teachers: dict[str, str], scores: Path, tmp_path: Path
) -> None:
    named = read_artifact(rollouts, "rollouts")
    settings = {name: value for name, value in named.manifest.config.items() if name != "teacher_by"}
    plain = tmp_path / "rollouts"
    with Writer.open(plain, replace(named.manifest, config=settings, parts=(), state="partial")) as writer:
        for part in named.tables:
            writer.write_table(part.file, named.read_part(part).drop_columns(["teacher"]))
        writer.finish(named.manifest.summary)
    with pytest.raises(InputError, match=r"records none by name.*--teacher-by source"):
        score(plain, str(student), teachers, tmp_path / "s", CONFIG)
    with pytest.raises(InputError, match=r"does not record the column 'field'.*tsdkd generate"):
        score(plain, str(student), teachers, tmp_path / "s", replace(CONFIG, teacher_by="field"))
    assert not (tmp_path / "s").exists()
    by_source = score(plain, str(student), teachers, tmp_path / "s", replace(CONFIG, teacher_by="source"))
    assert rows_of(by_source) == rows_of(read_artifact(scores, "scores"))
    assert by_source.manifest.config["teacher_by"] == "source"


def test_a_row_without_a_teacher_of_this_name_is_refused(
    rollouts: Path, student: Path, teachers: dict[str, str], tmp_path: Path
) -> None:
    sample_id = read_artifact(rollouts, "rollouts").table(["sample_id"])["sample_id"][1]
    only_math = {"math": teachers["math"]}
    with pytest.raises(InputError, match=f"{sample_id} of .* names the teacher 'code'; the teachers are math"):
        score(rollouts, str(student), only_math, tmp_path / "s", CONFIG)
    assert not (tmp_path / "s").exists()


def test_each_teacher_needs_the_students_tokenizer(
    rollouts: Path, student: Path, teachers: dict[str, str], other_family: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="different tokenizers"):
        score(rollouts, str(student), teachers | {"math": str(other_family)}, tmp_path / "s", CONFIG)
    assert not (tmp_path / "s").exists()


def test_a_teacher_without_a_response_is_named_and_not_loaded(
    rollouts: Path, student: Path, teachers: dict[str, str], tmp_path: Path, scores: Path
) -> None:
    observer = RecordingObserver()
    more = teachers | {"law": teachers["math"]}
    artifact = score(rollouts, str(student), more, tmp_path / "s", CONFIG, observer)
    assert observer.warnings == ["No response has the teacher law."]
    assert rows_of(artifact) == rows_of(read_artifact(scores, "scores"))
    files = [part.file for part in artifact.manifest.parts]
    assert "teacher_head-1.safetensors" not in files  # that of law, between code and math
    assert set(OfflineSource(rollouts, artifact.path).decoder.heads) == {"code", "math"}


@pytest.mark.parametrize(
    ("policy", "did"),
    [
        ("student", "The end tokens of another teacher math end the responses"),
        ("teacher", "Another teacher math sampled the rollouts"),
    ],
)
def test_a_warning_tells_what_another_teacher_did(
    policy: str, did: str, student: Path, teachers: dict[str, str], tmp_path: Path
) -> None:
    prompts, own, other = tmp_path / "math.jsonl", {"math": teachers["math"]}, {"math": teachers["code"]}
    prompts.write_text('{"prompt": "Count to 3"}\n')
    sampling = GenerateConfig(policy=policy, max_new_tokens=2, teacher_by="source")
    responding = str(student) if policy == "student" else None
    generate(prompts, responding, tmp_path / "r", sampling, teachers=own)
    for name, models, warnings in (("own", own, []), ("other", other, [f"{did}: {teachers['math']}."])):
        observer = RecordingObserver()
        score(tmp_path / "r", str(student), models, tmp_path / name, CONFIG, observer)
        assert observer.warnings == warnings


def test_one_named_teacher_has_the_files_of_an_only_one(
    alone: dict[str, Artifact], student: Path, teachers: dict[str, str], tmp_path: Path
) -> None:
    (own,), plain = alone["math"].manifest.parents, alone["math"]
    named = score(plain.path / own.path, str(student), {"math": teachers["math"]}, tmp_path / "named", CONFIG)
    assert [part.file for part in named.manifest.parts] == [part.file for part in plain.manifest.parts]
    assert rows_of(named) == rows_of(plain)
    assert set(named.table(["teacher"])["teacher"].to_pylist()) == {"math"}
    assert set(plain.table(["sample_id", "teacher"])["teacher"].to_pylist()) == {None}


@pytest.mark.parametrize("damage", ["name", "file"])
def test_rows_of_another_teacher_are_damaged(scores: Path, tmp_path: Path, damage: str) -> None:
    """A row names the teacher that the name of its part does, and the manifest records it."""
    whole = read_artifact(scores, "scores")
    with Writer.open(tmp_path / "s", replace(whole.manifest, parts=(), state="partial")) as writer:
        for part in whole.manifest.parts:
            first = part.file == "part-00000-0.parquet"
            if first and damage == "name":
                table = whole.read_part(part)
                column = table.column_names.index("teacher")
                writer.write_table(part.file, table.set_column(column, "teacher", [["math"] * len(table)]))
                continue
            file = "part-00000-2.parquet" if first else part.file
            writer.temporary_path(file).write_bytes((scores / part.file).read_bytes())
            writer.add_file(file, part.rows)
        writer.finish({})
    wrong = "the name of another teacher" if damage == "name" else "a teacher that the manifest does not record"
    with pytest.raises(ArtifactError, match=wrong):
        verify_artifact(tmp_path / "s")


def test_the_disk_is_checked_for_all_teachers_before_anything_is_written(
    rollouts: Path,
    student: Path,
    teachers: dict[str, str],
    scores: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scores of the first teacher alone would fit."""

    class Disk:
        free = read_artifact(scores, "scores").manifest.summary["expected_bytes"] - 1000

    monkeypatch.setattr(loop.shutil, "disk_usage", lambda _: Disk)
    with pytest.raises(TsdkdError, match="Scores need"):
        score(rollouts, str(student), teachers, tmp_path / "s", CONFIG)
    assert not (tmp_path / "s").exists()


def test_vllm_reads_with_one_teacher_after_the_other(
    rollouts: Path,
    student: Path,
    teachers: dict[str, str],
    alone: dict[str, Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stand-in reads as transformers does; it has float32 alone, as the teacher of math."""
    for module in (vllm_reader, reader_check):
        monkeypatch.setattr(module, "EngineProcess", ReadingProcess)
    monkeypatch.setattr(stage, "require_vllm", lambda: None)
    monkeypatch.setattr(stage, "engine_version", lambda _: {"vllm": "0"})
    config = replace(CONFIG, engine="vllm", dtype="float32")
    several = rows_of(score(rollouts, str(student), teachers, tmp_path / "s", config))
    for sample_id, row in rows_of(alone["math"]).items():
        for name in ("student_log_prob", "teacher_log_prob", "teacher_entropy"):
            assert several[sample_id][name] == pytest.approx(row[name], rel=1e-4)
    assert len(several) == len(FIELDS)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, FakeServer]]:
    monkeypatch.setattr(connection, "FIRST_PAUSE", 0.001)
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(
                serve(FakeServer(random_model(258, seed), max_logprobs=100, model=f"served/{name}"))
            )
            for seed, name in enumerate(("code", "math"))
        }


def test_each_server_reads_its_own_rows(
    servers: dict[str, FakeServer], rollouts: Path, student: Path, teachers: dict[str, str], tmp_path: Path
) -> None:
    """Servers are named by options, and not mixed with loaded teachers."""
    command = "score", "--rollouts", rollouts, "--student", student, "--scores", tmp_path / "s", "--signal", "topk"
    urls = [word for name, server in servers.items() for word in ("--teacher-url", f"{name}={server.url}")]
    cause, remedy = refuse(*command, *urls[:2], "--teacher", f"math={teachers['math']}")
    assert "No --teacher-url is given for math" in cause
    assert "--teacher-url for each teacher" in remedy
    assert not (tmp_path / "s").exists()
    shown = run(*command, *urls, "--k", 4, "--top-k", 64, "--teacher", "math=served/math")
    assert "served/math" in shown
    assert "by math" in shown
    several, own = read_artifact(tmp_path / "s", "scores"), rollouts_of_one(rollouts, "math", tmp_path / "rollouts")
    alone = score_served(own, str(student), servers["math"].url, "served/math", tmp_path / "alone", SERVED)
    assert rows_of(several) | rows_of(alone) == rows_of(several)
    assert {name: record.name for name, record in several.manifest.teachers.items()} == {
        "code": "served/code",
        "math": "served/math",
    }
    assert set(several.manifest.summary["teachers"]) == {"code", "math"}
    verify_artifact(several.path)


def test_a_command_takes_the_teachers_by_name(
    rollouts: Path, student: Path, teachers: dict[str, str], scores: Path, tmp_path: Path
) -> None:
    named = [word for name, model in teachers.items() for word in ("--teacher", f"{name}={model}")]
    command = "score", "--rollouts", rollouts, "--student", student, "--k", 4, "--batch-tokens", 256
    shown = run(*command, "--scores", tmp_path / "s", *named)
    assert "teacher code" in shown
    assert "4 responses" in shown
    assert rows_of(read_artifact(tmp_path / "s", "scores")) == rows_of(read_artifact(scores, "scores"))
    cause, _ = refuse(*command, "--scores", tmp_path / "o")
    assert "no teacher has a name" in cause


def test_too_little_mass_at_the_end_warns_and_keeps_the_scores(
    servers: dict[str, FakeServer], rollouts: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample decides before anything is written; no block decides later."""
    observer = RecordingObserver()
    monkeypatch.setattr("tsdkd.stages.score.pairs.require_captured_mass", lambda *_: None)
    urls = {name: server.url for name, server in servers.items()}
    artifact = score_served(rollouts, str(student), urls, None, tmp_path / "s", replace(SERVED, top_k=2), observer)
    found = [warning for warning in observer.warnings if "of its probability" in warning]
    assert [warning.split(" hold")[0] for warning in found] == [
        f"The 2 most likely tokens of the teacher {name}" for name in ("code", "math")
    ]
    assert artifact.manifest.state == "complete"


def test_all_teachers_compare_the_ids_that_all_models_know(tmp_path: Path) -> None:
    """One teacher has no row for a token that was added to all tokenizers."""
    known = {"student": 0, "code": 3, "math": -1}
    models = {
        name: save_tiny_model(tmp_path / name, seed=seed, padding_rows=rows, extra=("<|tool|>",))
        for seed, (name, rows) in enumerate(known.items())
    }
    rollouts = sampled_run(tmp_path, models["student"]) / "rollouts"
    named = {name: str(models[name]) for name in ("code", "math")}
    several = score(rollouts, str(models["student"]), named, tmp_path / "s", CONFIG)
    heads = OfflineSource(rollouts, several.path).decoder.heads
    assert {name: head.vocab for name, head in heads.items()} == {"code": 258, "math": 258}
