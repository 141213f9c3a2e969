"""What stands where a user named nothing: the embedded pair and the embedded prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tsdkd.cli.console import Reporter

if TYPE_CHECKING:
    from tsdkd.artifacts import Manifest

EMBEDDED = Path(__file__).parents[1] / "embedded"
PROMPTS = EMBEDDED / "prompts.jsonl"
STUDENT_DROPS = 2
"""Layers the embedded student lacks."""


def teacher(name: str | None, recorded: Manifest | None = None) -> str:
    """The teacher named, else the one that was recorded, else the embedded one, made on first use."""
    return name or _recorded(recorded, "teacher") or embedded_teacher()


def student(name: str | None, recorded: Manifest | None = None) -> str:
    """The student named, else the one that was recorded, else the embedded one, made on first use."""
    return name or _recorded(recorded, "student") or embedded_student()


def embedded_teacher() -> str:
    from tsdkd.stages.embedded import ensure_teacher, teacher_dir

    if not teacher_dir().exists():
        Reporter().say("Preparing the embedded teacher, SmolLM2-135M-Instruct (once).")
    return str(ensure_teacher())


def embedded_student() -> str:
    from tsdkd.stages.config import PruneConfig
    from tsdkd.stages.embedded import student_dir
    from tsdkd.stages.prune import prune

    return str(prune(embedded_teacher(), PROMPTS, student_dir(), PruneConfig(drop=STUDENT_DROPS), Reporter()).path)


def _recorded(manifest: Manifest | None, role: str) -> str | None:
    names = [model.name for model in manifest.models if model.role == role] if manifest else []
    return names[0] if names else None
