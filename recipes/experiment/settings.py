"""The settings of a bench, which are equal for all of its methods, and their limits."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tsdkd.errors import InputError

SETTINGS_FILE = "settings.json"
SEARCH_SEED = 0
"""The seed whose student chooses the learning rates. The test does not use it."""
FACTORS = (0.25, 1.0, 4.0, 16.0)
"""The grid of learning rates, as factors of the task's."""
MIN_SEEDS = 4


def read_numbers(name: str, text: str, kind: type[int] | type[float]) -> tuple[Any, ...]:
    """The numbers of a variable such as SEEDS. Raises InputError for other text."""
    try:
        return tuple(map(kind, text.split()))
    except ValueError:
        raise InputError(f"{name} is {text!r}.", f"Give numbers, such as {name}='1 2 3 4'.") from None


@dataclass(frozen=True)
class Settings:
    """The settings of a bench or of a study's task.

    The methods are separate, because other methods, seeds and factors continue what a directory has.
    """

    task: str
    scale: str = "full"
    seeds: tuple[int, ...] = (1, 2, 3, 4)
    factors: tuple[float, ...] = FACTORS
    teacher: str = ""
    """The teacher of the task `own`. Other tasks ignore this field and all fields below."""
    student: str = ""
    prompts: str = ""
    benchmark: str = ""
    eval_options: str = ""
    """More options of `tsdkd eval` on the benchmark."""
    engine: str = "transformers"
    """The engine that samples responses."""
    response_tokens: int = 512
    """The most tokens of a response."""

    def __post_init__(self) -> None:
        """Raise InputError for settings that the protocol excludes."""
        if SEARCH_SEED in self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(
                f"The seeds are {' '.join(map(str, self.seeds))}.",
                f"Name each seed once, and not {SEARCH_SEED}, which the search uses.",
            )
        if min(self.factors, default=0) <= 0 or len(set(self.factors)) < len(self.factors):
            raise InputError(
                f"The factors are {' '.join(f'{factor:g}' for factor in self.factors)}.",
                "Name each factor once, above 0: FACTORS='0.25 1 4 16'.",
            )

    def require_seeds(self) -> None:
        """Raise InputError for fewer seeds than a comparison of methods needs."""
        if self.scale == "full" and len(self.seeds) < MIN_SEEDS:
            raise InputError(f"There are only {len(self.seeds)} seeds.", f"Give {MIN_SEEDS} or more: SEEDS='1 2 3 4'.")

    def record(self, directory: Path, conditions: object) -> None:
        """Write the settings that all arms share, and the task's conditions, into the directory.

        Raises InputError if it records different ones.
        """
        file = directory / SETTINGS_FILE
        settings = _flat(asdict(self) | {"conditions": asdict(conditions)})
        del settings["seeds"], settings["factors"]  # an arm depends on its own seed and learning rate alone
        recorded = json.loads(file.read_text()) if file.is_file() else settings
        different = [name for name in settings if settings[name] != recorded.get(name)]
        if different:
            changes = [f"{name} {recorded.get(name)!r} and not {settings[name]!r}" for name in different]
            raise InputError(
                f"{directory} has the bench of {', '.join(changes)}.",
                "Choose another RUN, or give the settings that the bench has.",
            )
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(settings, indent=1) + "\n")
        temporary.rename(file)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level of names, such as `conditions.batch`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
