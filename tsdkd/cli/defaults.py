"""What stands where a user named nothing: the embedded pair and the embedded prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tsdkd.cli.console import ConsoleObserver

if TYPE_CHECKING:
    from tsdkd.artifacts.manifest import Manifest

EMBEDDED = Path(__file__).parents[1] / "stages" / "data" / "embedded"
PROMPTS = EMBEDDED / "prompts.jsonl"
STUDENT_DROPS = 3
"""Layers the embedded student lacks."""
EMBEDDED_TEACHER, EMBEDDED_STUDENT = "embedded-teacher", "embedded-student"
"""By these names the embedded pair can be named."""


def teacher(name: str | None, recorded: Manifest | None = None) -> str:
    """The teacher named, else the one that was recorded, else the embedded one, made on first use."""
    return model(name or _recorded(recorded, "teacher") or EMBEDDED_TEACHER)


def student(name: str | None, recorded: Manifest | None = None) -> str:
    """The student named, else the one that was recorded, else the embedded one, made on first use."""
    return model(name or _recorded(recorded, "student") or EMBEDDED_STUDENT)


def model(name: str) -> str:
    """A model's directory or hub id; one of the embedded pair is made on first use."""
    known = {EMBEDDED_TEACHER: embedded_teacher, EMBEDDED_STUDENT: embedded_student}
    return known[name]() if name in known else name


def embedded_teacher() -> str:
    from tsdkd.stages.models.embedded import ensure_teacher, teacher_dir

    if not teacher_dir().exists():
        ConsoleObserver().info("Preparing the embedded teacher, SmolLM2-135M-Instruct (once).")
    return str(ensure_teacher())


def embedded_student() -> str:
    from dataclasses import asdict

    from tsdkd.artifacts.hashing import file_digest, json_digest
    from tsdkd.artifacts.manifest import MANIFEST_FILE, load_manifest
    from tsdkd.stages.config.prune import PruneConfig
    from tsdkd.stages.models.embedded import cache_dir
    from tsdkd.stages.prune import prune

    teacher_, config = embedded_teacher(), PruneConfig(drop=STUDENT_DROPS)
    made_from = [file_digest(Path(teacher_) / "model.safetensors"), file_digest(PROMPTS), asdict(config)]
    place = cache_dir() / f"embedded-student-{json_digest(made_from)[:12]}"
    if not (place / MANIFEST_FILE).is_file() or load_manifest(place).state != "complete":
        ConsoleObserver().info(
            f"Preparing the embedded student, the teacher without {STUDENT_DROPS} of its layers (once)."
        )
        prune(teacher_, PROMPTS, place, config, ConsoleObserver())
    return str(place)


def _recorded(manifest: Manifest | None, role: str) -> str | None:
    names = [model.name for model in manifest.models if model.role == role] if manifest else []
    return names[0] if names else None
