"""The protocol: everything that a bench holds fixed for all methods."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tsdkd.errors import InputError

SETTINGS_FILE = "settings.json"
SEARCH_SEED = 0
"""Its models and responses serve the search of learning rates alone."""
FACTORS = (0.25, 1.0, 4.0, 16.0)
"""The grid of learning rates, as factors of the task's."""
MIN_SEEDS = 4


def read_numbers(name: str, text: str, kind: type[int] | type[float]) -> tuple[Any, ...]:
    """The numbers of a variable such as SEEDS. Raises InputError for words."""
    try:
        return tuple(map(kind, text.split()))
    except ValueError:
        raise InputError(f"{name} is {text!r}.", f"Give numbers, such as {name}='1 2 3 4'.") from None


@dataclass(frozen=True)
class Settings:
    """One bench, but for its methods."""

    task: str
    scale: str = "full"
    seeds: tuple[int, ...] = (1, 2, 3, 4)
    factors: tuple[float, ...] = FACTORS
    teacher: str = ""
    """Of a task of the user's own, as all that follow."""
    student: str = ""
    prompts: str = ""
    benchmark: str = ""
    eval_options: str = ""
    """More options of `tsdkd eval` on that benchmark."""
    engine: str = "transformers"
    """Of its sampling."""
    response_tokens: int = 512
    """The limit of its responses."""

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
        if self.scale == "full" and len(self.seeds) < MIN_SEEDS:
            raise InputError(f"There are only {len(self.seeds)} seeds.", f"Give {MIN_SEEDS} or more: SEEDS='1 2 3 4'.")

    def record(self, directory: Path) -> None:
        """Write the settings into the bench's directory. Raises InputError where the bench has others."""
        file = directory / SETTINGS_FILE
        settings = json.loads(json.dumps(asdict(self)))
        recorded = json.loads(file.read_text()) if file.is_file() else settings
        # An arm's result depends on its own seed and learning rate alone.
        fixed = [name for name in settings if name not in {"seeds", "factors"}]
        different = [name for name in fixed if settings[name] != recorded.get(name)]
        if different:
            changes = [f"{name} {recorded.get(name)!r} and not {settings[name]!r}" for name in different]
            raise InputError(
                f"{directory} has the bench of {', '.join(changes)}.",
                "Choose another RUN, or give the settings that the bench has.",
            )
        directory.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(settings, indent=1) + "\n")
        temporary.rename(file)
