"""generate with several teachers: each responds to its own prompts, and the rollouts name it."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models import CHAT, save_tiny_model
from tests.helpers.training import RecordingObserver
from tsdkd.artifacts.reader import Artifact
from tsdkd.artifacts.schemas import SCHEMAS
from tsdkd.errors import InputError
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.generate import sampling, stage
from tsdkd.stages.generate.stage import generate

Contents = Callable[[Path], dict[str, bytes]]
NAMES = ("code/py 3", "math")
"""In their order; the first has characters that a directory cannot have or should not."""
CONFIG = GenerateConfig(max_new_tokens=8, batch_size=3, part_size=2, temperature=0.0, accept_k=1, teacher_by="field")


@pytest.fixture(scope="module")
def teachers(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two teachers of two widths."""
    other = save_tiny_model(tmp_path_factory.mktemp("teachers") / "other", seed=7, layers=3, width=64)
    return dict(zip(NAMES, (str(teacher), str(other)), strict=True))


@pytest.fixture
def fields(tmp_path: Path) -> Path:
    return write_fields(tmp_path / "fields.jsonl", [NAMES[i % 3 == 1] for i in range(10)])


def write_fields(path: Path, names: list[object]) -> Path:
    rows = [{"prompt": f"Is {i} more than {7 * i % 5}?", "field": name} for i, name in enumerate(names)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sample(
    prompts: Path, student: Path, teachers: Mapping[str, str], output: Path, config: GenerateConfig, **more: Any
) -> Artifact:
    learner = None if config.policy == "teacher" else str(student)
    return generate(prompts, learner, output, config, teachers=teachers, **more)


@pytest.mark.parametrize("policy", ["student", "teacher", "mixed", "speculative", "teacher-mixed"])
def test_each_response_is_the_one_with_its_teacher_alone(
    student: Path, teachers: dict[str, str], fields: Path, tmp_path: Path, policy: str
) -> None:
    config = replace(CONFIG, policy=policy)
    artifact = sample(fields, student, teachers, tmp_path / "r", config)
    alone = {
        name: sample(fields, student, {"": model}, tmp_path / f"r{i}", replace(config, teacher_by=None)).table()
        for i, (name, model) in enumerate(teachers.items())
    }
    if policy != "student":
        assert alone[NAMES[0]]["response_ids"] != alone[NAMES[1]]["response_ids"]
    expected = {name: {row["sample_id"]: row for row in table.to_pylist()} for name, table in alone.items()}
    fields_of = {row["prompt"]: row["field"] for row in map(json.loads, fields.read_text().splitlines())}
    rows = artifact.table().to_pylist()
    assert len(rows) == 10
    for row in rows:
        name = row.pop("teacher")
        assert name == fields_of[row["messages"][0]["content"]]
        assert row == expected[name][row["sample_id"]]
    with_student = [] if policy == "teacher" else ["student"]
    assert [m.role for m in artifact.manifest.models] == [*with_student, *(f"teacher:{name}" for name in NAMES)]
    assert {name: record.name for name, record in artifact.manifest.teachers.items()} == teachers
    assert artifact.manifest.config["teacher_by"] == "field"


def test_a_part_has_one_author_and_one_teacher_and_one_engine_is_open_at_a_time(
    student: Path,
    teachers: dict[str, str],
    fields: Path,
    tmp_path: Path,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The student's parts come first, then the teachers' by name; an interrupted run ends with the same bytes."""
    opened, open_now, open_engine = list[tuple[str, ...]](), 0, sampling.open_engine

    @contextmanager
    def counting(author: str, models: Mapping[str, Any], *args: Any) -> Iterator[Any]:
        nonlocal open_now
        opened.append((author, *(spec.name for spec in models.values())))
        open_now += 1
        assert open_now == 1
        with open_engine(author, models, *args) as engine:
            yield engine
        open_now -= 1

    monkeypatch.setattr(sampling, "open_engine", counting)
    config = replace(CONFIG, policy="mixed", temperature=1.0)
    whole = sample(fields, student, teachers, tmp_path / "whole", config)
    assert opened == [
        ("student", str(student)),
        *(("teacher", str(student), teachers[name]) for name in NAMES),
    ]
    columns = ["author", "teacher"]
    authorships = [{tuple(row.values()) for row in whole.read_part(part, columns).to_pylist()} for part in whole.tables]
    by_teacher = [next(iter(pairs)) for pairs in authorships if "teacher" in {author for author, _ in pairs}]
    assert all(len(pairs) == 1 for pairs in authorships if ("teacher" in {author for author, _ in pairs}))
    assert by_teacher == sorted(by_teacher)
    assert {name for _, name in by_teacher} == {*NAMES}
    assert {author for author, _ in authorships[0]} == {"student"}

    write, last = stage.Writer.write_table, whole.tables[-1].file

    def interrupted(self: stage.Writer, file: str, *args: object) -> None:
        if file == last:
            raise KeyboardInterrupt
        write(self, file, *args)

    with monkeypatch.context() as patched:
        patched.setattr(stage.Writer, "write_table", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample(fields, student, teachers, tmp_path / "cut", config)
    opened.clear()
    open_now = 0
    sample(fields, student, teachers, tmp_path / "cut", config)
    assert opened == [("teacher", str(student), teachers[NAMES[1]])]  # only what is missing
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("physics", r"names the teacher 'physics'; the teachers are code/py 3, math"),
        ("", "is empty, so that the prompt names no teacher"),
        (None, "is empty, so that the prompt names no teacher"),
        (["math"], "'field' is neither text nor a number"),
    ],
)
def test_a_prompt_without_a_known_teacher_is_refused_with_its_place(
    student: Path, teachers: dict[str, str], tmp_path: Path, name: object, cause: str
) -> None:
    file = write_fields(tmp_path / "fields.jsonl", ["math", "math", name])
    with pytest.raises(InputError, match=cause) as refused:
        sample(file, student, teachers, tmp_path / "r", CONFIG)
    assert refused.value.cause.startswith(f"{file}, line 3: ")
    assert not (tmp_path / "r").exists()


def test_a_missing_column_is_refused_with_the_columns_that_exist(
    student: Path, teachers: dict[str, str], fields: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="line 1: the column 'topic' does not exist") as refused:
        sample(fields, student, teachers, tmp_path / "r", replace(CONFIG, teacher_by="topic"))
    assert refused.value.remedy == "Write a teacher's name, or choose with --teacher-by one of: prompt, field."


def test_the_source_is_the_files_name_and_a_teacher_without_prompts_is_a_warning(
    student: Path, teachers: dict[str, str], tmp_path: Path
) -> None:
    file, observer = write_fields(tmp_path / "math.jsonl", ["ignored", "ignored"]), RecordingObserver()
    artifact = sample(file, student, teachers, tmp_path / "r", replace(CONFIG, teacher_by="source"), observer=observer)
    assert {*artifact.table(["teacher"])["teacher"].to_pylist()} == {"math"}
    assert observer.warnings == ["No prompt has the teacher code/py 3: the column source does not name it."]

    spaced = write_fields(tmp_path / "maths notes.jsonl", ["math"])
    with pytest.raises(
        InputError, match=r"line 1: the file, as the row has no 'source', names the .*'maths notes'"
    ) as no:
        sample(spaced, student, teachers, tmp_path / "n", replace(CONFIG, teacher_by="source"))
    assert no.value.remedy == "Add --teacher 'maths notes=MODEL', or correct the row."


def test_names_are_recorded_without_the_teachers(student: Path, fields: Path, tmp_path: Path) -> None:
    """For `tsdkd score`, which reads them later; names that no option can give are refused."""
    artifact = sample(fields, student, {}, tmp_path / "r", CONFIG)
    assert {*artifact.table(["teacher"])["teacher"].to_pylist()} == {*NAMES}
    assert [model.role for model in artifact.manifest.models] == ["student"]
    file = write_fields(tmp_path / "names.jsonl", ["a=b"])
    with pytest.raises(InputError, match="line 1: the column 'field' names the teacher 'a=b', which no option"):
        sample(file, student, {}, tmp_path / "n", CONFIG)


def test_given_responses_have_teachers(student: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "response": f"{i}", "field": NAMES[i % 2]} for i in range(4)]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = GenerateConfig(policy="given", teacher_by="field")
    artifact = sample(tmp_path / "given.jsonl", student, {}, tmp_path / "r", config)
    assert artifact.table(["teacher"])["teacher"].to_pylist() == [row["field"] for row in rows]
    assert artifact.manifest.config["teacher_by"] == "field"


def test_one_teacher_is_no_column(student: Path, teacher: Path, prompts: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, policy="mixed", teacher_by=None)
    artifact = sample(prompts, student, {"": str(teacher)}, tmp_path / "r", config)
    assert all(artifact.read_part(part).schema.names == SCHEMAS["rollouts"].names for part in artifact.tables)
    assert "teacher_by" not in artifact.manifest.config
    assert [model.role for model in artifact.manifest.models] == ["student", "teacher"]


def test_teachers_that_respond_alone_need_one_chat_template(
    student: Path, teachers: dict[str, str], fields: Path, tmp_path: Path
) -> None:
    """The prompts of one artifact are in one format; a student's template, or a given one, serves all teachers."""
    other = tmp_path / "other"
    shutil.copytree(teachers["math"], other)
    (other / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    pair = teachers | {"math": str(other)}
    with pytest.raises(InputError, match="different chat templates") as refused:
        sample(fields, student, pair, tmp_path / "r", replace(CONFIG, policy="teacher"))
    assert "--chat-template" in refused.value.remedy
    assert "--policy mixed --lambda 0" in refused.value.remedy
    assert not (tmp_path / "r").exists()
    config = replace(CONFIG, policy="mixed", student_fraction=0.0)
    assert {*sample(fields, student, pair, tmp_path / "m", config).table()["author"].to_pylist()} == {"teacher"}
    (tmp_path / "chat.jinja").write_text(CHAT)
    chat = replace(CONFIG, policy="teacher", chat=ChatConfig(str(tmp_path / "chat.jinja")))
    same = sample(fields, student, teachers, tmp_path / "same", replace(CONFIG, policy="teacher")).table()
    assert sample(fields, student, pair, tmp_path / "t", chat).table() == same


@pytest.mark.parametrize(
    ("policy", "with_student", "names", "column", "cause"),
    [
        ("teacher", True, ("math",), "field", "does not use the student"),
        ("given", True, ("math",), "field", "does not use the teacher"),
        ("teacher", False, (), "field", "needs a teacher"),
        ("mixed", True, (), None, "needs a student and a teacher"),
        ("mixed", True, ("math",), None, "exactly if a column"),
        ("mixed", True, ("",), "field", "exactly if a column"),
    ],
)
def test_models_that_a_policy_cannot_use_are_refused(
    student: Path,
    teacher: Path,
    fields: Path,
    tmp_path: Path,
    policy: str,
    with_student: bool,
    names: tuple[str, ...],
    column: str | None,
    cause: str,
) -> None:
    config = GenerateConfig(policy=policy, teacher_by=column)
    with pytest.raises(InputError, match=cause):
        generate(
            fields,
            str(student) if with_student else None,
            tmp_path / "r",
            config,
            teachers=dict.fromkeys(names, str(teacher)),
        )
    assert not (tmp_path / "r").exists()
