"""Defaults where the user names nothing: the embedded models and the embedded prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tsdkd.cli.console import ConsoleObserver
from tsdkd.cli.options import parse_teachers
from tsdkd.errors import InputError

if TYPE_CHECKING:
    from tsdkd.artifacts.manifest import Manifest

EMBEDDED = Path(__file__).parents[1] / "stages" / "data" / "embedded"
PROMPTS = EMBEDDED / "prompts.jsonl"
STUDENT_DROPS = 3
"""Layers of the teacher that the embedded student does not have."""
EMBEDDED_TEACHER, EMBEDDED_STUDENT = "embedded-teacher", "embedded-student"
"""The names of the embedded models, for every option that names a model."""


def teacher(name: str | None) -> str:
    """The named teacher, else the embedded one."""
    return model(name or EMBEDDED_TEACHER)


def teachers(values: list[str] | None, teacher_by: str | None, recorded: Manifest | None = None) -> dict[str, str]:
    """The teachers by name: as --teacher gives them, else as recorded, else the embedded one, whose name is "".

    `recorded`: the manifest of rollouts, whose `teacher_by` counts where none is given.
    Raises InputError for several teachers without a column, and for a column without named teachers.
    """
    names = {name: record.name for name, record in recorded.teachers.items()} if recorded else {}
    named = named_teachers(values, teacher_by or recorded_teacher_by(recorded), names)
    return {name: model(at) for name, at in (named or {"": EMBEDDED_TEACHER}).items()}


def named_teachers(values: list[str] | None, teacher_by: str | None, recorded: dict[str, str]) -> dict[str, str]:
    """The teachers by name, as --teacher gives them, else as recorded. Raises InputError as `teachers` does."""
    names = parse_teachers("--teacher", values, teacher_by) or recorded
    if teacher_by and not names.keys() - {""}:
        raise InputError(
            f"The column {teacher_by!r} names the teacher of each prompt, and no teacher has a name.",
            "Give --teacher NAME=MODEL for each name in the column.",
        )
    return names


def recorded_teacher_by(rollouts: Manifest | None) -> str | None:
    """The column of the prompts by which rollouts record teachers."""
    return rollouts.config.get("teacher_by") if rollouts else None


def student(name: str | None, recorded: Manifest | None = None) -> str:
    """The named student, else the recorded one, else the embedded one."""
    models = recorded.models if recorded else ()
    recorded_name = next((record.name for record in models if record.role == "student"), None)
    return model(name or recorded_name or EMBEDDED_STUDENT)


def model(name: str) -> str:
    """The directory or hub id of a model; an embedded model is made on first use."""
    embedded = {EMBEDDED_TEACHER: embedded_teacher, EMBEDDED_STUDENT: embedded_student}
    return embedded[name]() if name in embedded else name


def embedded_teacher() -> str:
    from tsdkd.stages.models.embedded import ensure_teacher, teacher_dir

    if not teacher_dir().exists():
        ConsoleObserver().info("Preparing the embedded teacher, SmolLM2-135M-Instruct (once).")
    return str(ensure_teacher())


def embedded_student() -> str:
    from dataclasses import asdict

    from tsdkd.artifacts.files import MANIFEST_FILE
    from tsdkd.artifacts.hashing import file_digest, json_digest
    from tsdkd.artifacts.locks import is_locked
    from tsdkd.artifacts.manifest import FORMAT, load_manifest
    from tsdkd.stages.config.prune import PruneConfig
    from tsdkd.stages.models.embedded import cache_dir
    from tsdkd.stages.prune import prune

    teacher_, config = embedded_teacher(), PruneConfig(drop=STUDENT_DROPS)
    inputs = [FORMAT, file_digest(Path(teacher_) / "model.safetensors"), file_digest(PROMPTS), asdict(config)]
    output = cache_dir() / f"embedded-student-{json_digest(inputs)[:12]}"
    if not (output / MANIFEST_FILE).is_file() or load_manifest(output).state != "complete":
        ConsoleObserver().info(
            f"Preparing the embedded student, the teacher without {STUDENT_DROPS} of its layers (once)."
        )
        if is_locked(output):
            raise InputError(
                "Another process is preparing the embedded student.", "Run the command again in about a minute."
            )
        prune(teacher_, PROMPTS, output, config, ConsoleObserver())
    return str(output)
