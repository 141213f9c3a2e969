"""The methods of the bench: the options of `tsdkd train` for each, and what the method itself says about its data."""

from dataclasses import dataclass
from pathlib import Path

from tsdkd.errors import InputError
from tsdkd.stages.methods import METHODS, Method, find_method

REFERENCE = "gkd"
"""The method that all others are compared with."""


@dataclass(frozen=True)
class Entry:
    """One method with its options."""

    name: str
    method: str
    options: str = ""

    @property
    def definition(self) -> Method:
        return find_method(self.method)

    @property
    def identity(self) -> dict[str, object]:
        """What an arm records of the entry; a method's file counts by its content."""
        origin = self.definition.origin
        return {"method": self.definition.name, "options": self.options, "origin": origin.recorded if origin else None}

    @property
    def records_responses(self) -> bool:
        """Whether it learns from recorded responses of the student and the teacher together."""
        return self.definition.authors == ("both",)

    def train_options(self, k: int | None) -> str:
        """The method's options; k replaces its number of tokens where it has one."""
        words = [f"--method {self.method}", self.options]
        if k is not None and "k" in self.definition.options:
            words.append(f"--method-option k={k}")
        if k is not None and "k" in self.definition.objective_options and self.definition.objective.alpha:
            words.append(f"--k {k}")
        return " ".join(filter(None, words))


ENTRIES = {
    entry.name: entry
    for entry in (
        Entry(REFERENCE, "gkd", "--beta 0.9"),
        Entry("gkd-0.5", "gkd", "--beta 0.5"),
        Entry("tsdkd", "tsdkd"),
        Entry("tsdkd-mild", "tsdkd", "--direct-weight 10 --em-weight 0.01"),
        Entry("tsdkd-no-entropy", "tsdkd", "--em-weight 0"),
        Entry("tsdkd-no-ranking", "tsdkd", "--alpha 0"),
        *(Entry(name, name) for name in METHODS if name not in {"gkd", "tsdkd"}),
    )
}


def choose(names: str) -> list[Entry]:
    """The reference and the named entries; all for "". A name may also be that of a method or a method's file.

    Raises InputError for an unknown name and for two files of one name.
    """
    chosen = {REFERENCE: ENTRIES[REFERENCE]}
    for word in names.split() or ENTRIES:
        entry = ENTRIES.get(word) or _other_entry(word)
        if chosen.setdefault(entry.name, entry) != entry:
            raise InputError(f"Two methods are named {entry.name}.", "Rename one of the files.")
    return list(chosen.values())


def _other_entry(word: str) -> Entry:
    path = Path(word).resolve() if word.endswith(".py") else word
    return Entry(find_method(str(path)).name, str(path))
