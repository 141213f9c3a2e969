"""Online training with several teachers: each reads the responses to its own prompts, one in memory at a time."""

import json
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import refuse, run
from tests.helpers.models import save_tiny_model
from tests.helpers.teacher_server import FakeServer, model_at, serve
from tests.helpers.training import (
    CONFIG,
    OBJECTIVE,
    SAMPLING,
    RecordingObserver,
    Weights,
    cut,
    logits_of_two_models,
    metrics,
    same_update,
    weights,
)
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.reader import Artifact
from tsdkd.core import tsdkd_loss
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import OnlineConfig, ReplayConfig, TrainConfig
from tsdkd.stages.data import served_scoring
from tsdkd.stages.data.online import samples_from_rollouts
from tsdkd.stages.data.replay import ReplaySchedule, ReplaySource
from tsdkd.stages.data.rollout_teachers import column_of_teachers
from tsdkd.stages.data.source import Sample
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.methods import find_method
from tsdkd.stages.metrics.log import is_step
from tsdkd.stages.score.stage import score
from tsdkd.stages.teacher_server import connection
from tsdkd.stages.train import teacher as online_teacher
from tsdkd.stages.train.prerequisites import require_known_teachers
from tsdkd.stages.train.stage import train_offline, train_online, train_served

Contents = Callable[[Path], dict[str, bytes]]
BY_FIELD = replace(SAMPLING, teacher_by="field")
ONLINE = replace(CONFIG, online=OnlineConfig(sampling=BY_FIELD))
ONE_STEP = replace(ONLINE, batch_size=10, epochs=1)
RECORDED = OnlineConfig(student_fraction=0, sampling=SAMPLING)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of another width."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=7, layers=3, width=64)


@pytest.fixture(scope="module")
def teachers(teacher: Path, other: Path) -> dict[str, str]:
    return {"code": str(teacher), "math": str(other)}


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten prompts; every third one is of math."""
    return write_fields(tmp_path_factory.mktemp("prompts") / "fields.jsonl", ["math", "code", "code"])


@pytest.fixture(scope="module")
def recorded(fields: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The student's responses, with the names of their teachers."""
    config = GenerateConfig(max_new_tokens=12, teacher_by="field")
    return generate(fields, str(student), tmp_path_factory.mktemp("recorded") / "rollouts", config)


def write_fields(path: Path, names: list[str]) -> Path:
    rows = [{"prompt": f"Is {i} more than {7 * i % 5}?", "field": names[i % len(names)]} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def packed(config: TrainConfig) -> TrainConfig:
    return replace(config, micro_batch_size=None, micro_batch_tokens=150)


def learn(
    data: Path, student: Path, teachers: Mapping[str, str], output: Path, config: TrainConfig = ONLINE, **more: object
) -> Weights:
    train_online(data, str(student), teachers, output, config, **more)
    return weights(output)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that are loaded as teachers, in turn; a load while another one is in memory fails."""
    loaded: list[str] = []
    living: list[weakref.ref[object]] = []
    load = online_teacher._load_teacher

    def count(name: str, *more: object) -> object:
        assert not any(model() for model in living)
        loaded.append(name)
        teacher = load(name, *more)
        living.append(weakref.ref(teacher.model))
        return teacher

    monkeypatch.setattr(online_teacher, "_load_teacher", count)
    return loaded


@pytest.mark.parametrize("change", [lambda config: config, packed], ids=["padded", "packed"])
def test_a_step_is_the_objective_of_each_responses_own_teacher(
    fields: Path,
    student: Path,
    teachers: dict[str, str],
    tmp_path: Path,
    responses: list[list[Sample]],
    loads: list[str],
    change: Callable[[TrainConfig], TrainConfig],
) -> None:
    learn(fields, student, teachers, tmp_path / "c", change(ONE_STEP))
    _, rows = responses
    assert len({row["teacher"] for row in rows}) == 2
    by_teacher = {name: logits_of_two_models(rows, student, Path(model)) for name, model in teachers.items()}
    (student_logits, _), mask = by_teacher["math"]
    own = torch.stack([by_teacher[row["teacher"]][0][1][i] for i, row in enumerate(rows)])
    loss, terms = tsdkd_loss(student_logits, own, mask, OBJECTIVE)
    (logged,) = metrics(tmp_path / "c")
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name in ("indirect", "direct", "teacher_entropy", "top1_agreement"):
        assert logged[name] == pytest.approx(terms[name].item(), rel=1e-4)
    assert loads == [*teachers.values()]
    manifest = load_manifest(tmp_path / "c")
    assert {name: record.name for name, record in manifest.teachers.items()} == teachers
    assert manifest.config["online"]["sampling"]["teacher_by"] == "field"


def test_recorded_responses_give_the_same_update_online_and_offline(
    recorded: Artifact, student: Path, teachers: dict[str, str], tmp_path: Path
) -> None:
    """Padded offline, packed online, and measured on the same held-out responses."""
    score(recorded.path, str(student), teachers, tmp_path / "scores", ScoreConfig(k=4))
    config = replace(CONFIG, held_out=0.3, eval_steps=2)
    train_offline(recorded.path, tmp_path / "scores", str(student), tmp_path / "offline", config)
    online = learn(recorded.path, student, teachers, tmp_path / "online", packed(replace(config, online=RECORDED)))
    assert same_update(online, weights(tmp_path / "offline"), weights(student))
    *_, offline_entry = metrics(tmp_path / "offline")
    *_, online_entry = metrics(tmp_path / "online")
    assert any("math" in key for key in online_entry)
    assert online_entry == pytest.approx({key: offline_entry[key] for key in online_entry}, rel=1e-3)


def test_teachers_are_loaded_when_a_step_needs_them(
    fields: Path, recorded: Artifact, teachers: dict[str, str], loads: list[str]
) -> None:
    """The one that is still loaded reads first; the name of each is shown once."""
    observer, samples = RecordingObserver(), samples_from_rollouts(recorded, 4, "field")
    reader = online_teacher.open_teacher(teachers, ONLINE, 258, [], observer)
    code, math = teachers.values()
    only_code = [sample for sample in samples if sample["teacher"] == "code"]
    for step, expected in ((only_code, [code]), (samples, [code, math]), (samples, [code, math, code])):
        reader.read_ahead(step)
        assert loads == expected
    for name, model in teachers.items():
        assert sum(f"The teacher {name} ({model}) loads in " in message for message in observer.messages) == 1
    require_known_teachers(fields, only_code, teachers, observer)
    assert observer.warnings == ["No prompt has the teacher math."]


def test_a_cut_run_ends_with_the_same_bytes(
    fields: Path,
    student: Path,
    teachers: dict[str, str],
    tmp_path: Path,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(ONLINE, epochs=3, held_out=0.3, eval_steps=1)
    learn(fields, student, teachers, tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        cut(patch, 2)
        with pytest.raises(RuntimeError, match="cut"):
            learn(fields, student, teachers, tmp_path / "cut", config)
    learn(fields, student, teachers, tmp_path / "cut", config)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_recorded_responses_keep_their_teachers(
    recorded: Artifact, student: Path, teachers: dict[str, str], tmp_path: Path, responses: list[list[Sample]]
) -> None:
    """The rollouts name them; with lambda above 0, some responses are sampled."""
    online = replace(RECORDED, student_fraction=0.5)
    learn(recorded.path, student, teachers, tmp_path / "c", replace(ONE_STEP, online=online))
    named = {row["sample_id"]: row["teacher"] for row in recorded.table().to_pylist()}
    written = {row["sample_id"]: row["response_ids"] for row in recorded.table().to_pylist()}
    _, rows = responses
    assert {row["sample_id"]: row["teacher"] for row in rows} == named
    assert 0 < sum(row["response_ids"] == written[row["sample_id"]] for row in rows) < len(rows)
    assert load_manifest(tmp_path / "c").config["online"]["sampling"]["teacher_by"] == "field"
    assert {row["teacher"] for row in samples_from_rollouts(recorded, None)} == {None}  # one teacher reads all


def test_rollouts_without_names_are_divided_by_their_source(
    fields: Path, student: Path, teachers: dict[str, str], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in fields.read_text().splitlines()]
    data = tmp_path / "sources.jsonl"
    data.write_text("".join(json.dumps({"prompt": row["prompt"], "source": row["field"]}) + "\n" for row in rows))
    rollouts = generate(data, str(student), tmp_path / "rollouts", GenerateConfig(max_new_tokens=12))
    column = column_of_teachers(rollouts, teachers, "source")
    assert {row["sample_id"]: row["teacher"] for row in samples_from_rollouts(rollouts, None, column)} == {
        row["sample_id"]: row["source"] for row in rollouts.table().to_pylist()
    }
    for column, cause in ((None, "records none by name"), ("field", "does not record the column 'field'")):
        online = replace(RECORDED, sampling=replace(SAMPLING, teacher_by=column))
        with pytest.raises(InputError, match=cause) as caught:
            learn(rollouts.path, student, teachers, tmp_path / "d", replace(ONE_STEP, online=online))
        assert "`tsdkd generate`" in caught.value.remedy
    assert not (tmp_path / "d").exists()


def test_replayed_responses_keep_their_teachers(
    fields: Path, student: Path, teachers: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = GenerateConfig(policy="teacher", max_new_tokens=12, teacher_by="field")
    data = generate(fields, None, tmp_path / "rollouts", written, teachers=teachers)
    named = {row["sample_id"]: row["teacher"] for row in data.table().to_pylist()}
    replay = ReplayConfig(phi=0.6, replay_tolerance=0.0, replay_capacity=4)
    online = OnlineConfig(student_fraction=0, sampling=SAMPLING, replay=replay)
    changes = {"method": "distillm", "objective": find_method("distillm").objective, "online": online}
    config = replace(CONFIG, **changes, epochs=3, batch_size=2, held_out=0.3, eval_steps=3)
    choose, respond = ReplaySchedule.choose_responses, ReplaySource.with_responses
    choices: list[str] = []
    seen: list[Sample] = []
    monkeypatch.setattr(
        ReplaySchedule, "choose_responses", lambda *given: choices.append(choose(*given)) or choices[-1]
    )
    monkeypatch.setattr(ReplaySource, "with_responses", lambda *given: seen.extend(s := respond(*given)) or s)
    learn(data.path, student, teachers, tmp_path / "c", config)
    assert {*choices} == {"recorded", "sampled", "replayed"}
    assert {(row["sample_id"], row["teacher"]) for row in seen} <= named.items()


def test_served_teachers_read_their_own_responses(
    fields: Path,
    student: Path,
    teachers: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    responses: list[list[Sample]],
) -> None:
    """Two servers give nearly the update of the two loaded teachers, and no sequence goes to the other one."""
    monkeypatch.setattr(connection, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(served_scoring, "MIN_CAPTURED_MASS", 0.3)  # the tiny teachers spread their probability
    measured = packed(replace(ONE_STEP, held_out=0.3, eval_steps=1))
    learn(fields, student, teachers, tmp_path / "loaded", measured)
    read: dict[str, list[list[int]]] = defaultdict(list)

    def spied(name: str) -> Callable[[list[int]], object]:
        log_probs = model_at(Path(teachers[name]))
        return lambda ids: read[name].append(ids) or log_probs(ids)

    config = replace(measured, online=replace(ONE_STEP.online, teacher_top_k=250))
    monkeypatch.setattr(online_teacher, "_load_teacher", pytest.fail)
    with (
        serve(FakeServer(spied("code"), max_logprobs=250, model="coder")) as code,
        serve(FakeServer(spied("math"), max_logprobs=250, model="mathematician")) as math,
    ):
        urls = {"code": code.url, "math": math.url}
        responses.clear()
        served = train_served(fields, str(student), urls, {"math": "mathematician"}, tmp_path / "served", config)
    exact, found = (next(filter(is_step, metrics(tmp_path / name))) for name in ("loaded", "served"))
    assert found["indirect"] == pytest.approx(exact["indirect"], rel=0.02)  # some candidates are outside the top K
    assert found["teacher_entropy"] == pytest.approx(exact["teacher_entropy"], rel=0.02)
    assert found["direct"] == pytest.approx(exact["direct"], rel=0.02)
    for rows in responses:
        for row in rows:
            readers = [name for name in urls if row["prompt_ids"] + row["response_ids"] in read[name]]
            assert readers == [row["teacher"]]
    assert [record.name for record in served.manifest.teachers.values()] == ["coder", "mathematician"]
    assert any("eval_kl" in entry for entry in metrics(tmp_path / "served"))


def test_teachers_and_columns_that_do_not_fit_are_refused_before_anything_is_loaded(
    fields: Path,
    recorded: Artifact,
    student: Path,
    teachers: dict[str, str],
    tmp_path: Path,
    loads: list[str],
) -> None:
    one = {"code": teachers["code"]}
    minillm = find_method("minillm")
    mixed = OnlineConfig(sampling=replace(BY_FIELD, policy="teacher-mixed"))
    for data, named, online, cause in (
        (fields, one, ONLINE.online, "line 1.*'math'; the teachers are code"),
        (recorded.path, one, RECORDED, "'math'; the teachers are code"),
        (fields, teachers, OnlineConfig(sampling=SAMPLING), "no column names"),
        (fields, teachers, OnlineConfig(sampling=replace(SAMPLING, teacher_by="topic")), "'topic' does not exist"),
        (fields, {"": teachers["code"]}, ONLINE.online, "no teacher has a name"),
        (recorded.path, teachers, replace(RECORDED, sampling=replace(SAMPLING, teacher_by="topic")), "column 'topic'"),
        (fields, teachers, mixed, "cannot sample in a mixture"),
    ):
        config = replace(ONE_STEP, online=online)
        if online is mixed:
            config = replace(config, method="minillm", objective=minillm.objective)
        with pytest.raises(InputError, match=cause):
            learn(data, student, named, tmp_path / "c", config)
    assert not (tmp_path / "c").exists()
    assert not loads


def test_the_command_takes_teachers_by_name(
    fields: Path, recorded: Artifact, student: Path, teachers: dict[str, str], tmp_path: Path
) -> None:
    """Rollouts that name teachers need only the models; the file of a run's options makes the run again."""
    named = [word for name, model in teachers.items() for word in ("--teacher", f"{name}={model}")]
    options = ["--student", student, "--k", 4, "--batch-size", 8, "--epochs", 1, "--max-new-tokens", 12]
    output = ["--checkpoint", tmp_path / "c"]
    shown = run("train", "--rollouts", recorded.path, *named, "--lambda", 0.5, *options, *output)
    assert "teacher code (online)" in shown
    assert "teacher math (online)" in shown
    run("train", "--config", tmp_path / "c" / "config.yaml", *output)  # another run is refused
    by_field = ["--teacher-by", "field", *options, "--checkpoint", tmp_path / "e"]
    cause, _ = refuse("train", "--prompts", fields, *named[:2], *by_field)
    assert "the column 'field' names the teacher 'math'; the teachers are code" in cause
    server = ["--teacher", "math=a", "--teacher-url", "code=http://127.0.0.1:1", "--teacher-by", "field"]
    cause, _ = refuse("train", "--prompts", fields, *server, *options, "--checkpoint", tmp_path / "e")
    assert "No --teacher-url is given for math" in cause
    cause, remedy = refuse("train", "--prompts", fields, *named, *options, "--checkpoint", tmp_path / "e")
    assert "no column names the teacher" in cause
    assert "--teacher-by" in remedy
    assert not (tmp_path / "e").exists()
