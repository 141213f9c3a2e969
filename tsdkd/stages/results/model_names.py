"""The names of a run's models and of their results, and their order."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tsdkd.artifacts.manifest import teacher_name

MODEL_ORDER = {"teacher": 0, "student": 1, "distilled": 2}
"""The order of a run's models; others follow. Several teachers are ordered by name."""
TEACHER_RESULTS = "teacher-"
"""How the name of the results of each of several teachers begins."""
NOT_IN_FILE_NAMES = re.compile(r"[/\\% ]")
"""Characters of a teacher's name that its directory of results writes as %XX."""


def model_sort_key(results: Path) -> tuple[int, str]:
    """The sort key of one model's results among those of its run."""
    name = "teacher" if results.name.startswith(TEACHER_RESULTS) else results.name
    return MODEL_ORDER.get(name, len(MODEL_ORDER)), results.name


def run_models(roles: Mapping[str, str], checkpoint: str) -> dict[str, str]:
    """The models that `eval` measures of a run, by the name of their results: teachers, student, distilled.

    `roles`: the names of the checkpoint's models by role.
    """
    teachers = {teacher_name(role): model for role, model in roles.items()}
    named = {teacher_results(name): model for name, model in teachers.items() if name is not None}
    return named | {"student": roles.get("student", checkpoint), "distilled": checkpoint}


def teacher_results(name: str) -> str:
    """The name of the results of a teacher; "" names an only teacher."""
    return TEACHER_RESULTS + NOT_IN_FILE_NAMES.sub(lambda found: f"%{ord(found[0]):02X}", name) if name else "teacher"


def shorten_paths(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of different paths that differ; directories named "results" are dropped where possible."""
    full = [path.resolve().parts for path in paths]
    without_results = [tuple(part for part in parts if part != "results") for parts in full]
    parts = without_results if len(set(without_results)) == len(full) else full
    length = next(n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(set(parts)))
    return ["/".join(p[-length:]) for p in parts]
