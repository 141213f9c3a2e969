"""Entries: the methods of an experiment, each with its options and a name."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Literal

from tsdkd.stages.methods import Method, find_method


@dataclass(frozen=True)
class Entry:
    """One method with its options."""

    name: str
    """Unique in an experiment, because it names directories."""
    method: str
    options: str = ""
    author: Literal["the method's", "half", "teacher"] = "the method's"
    """Author of the responses: the method's default, half of them by each model, or the teacher."""

    @property
    def definition(self) -> Method:
        return find_method(self.method)

    @property
    def identity(self) -> dict[str, object]:
        """The values that an arm records to identify its entry; a method's file is identified by its content."""
        origin = self.definition.origin
        identity = {"method": self.definition.name, "options": self.options}
        identity["origin"] = origin.recorded if origin else None
        return identity if self.author == "the method's" else identity | {"author": self.author}

    @property
    def records_responses(self) -> bool:
        """Whether it learns from responses that student and teacher write together before training."""
        return self.definition.authors == ("both",)

    def train_options(self, k: int | None) -> str:
        """The method's options. k is added for a method that has a k, unless the options name one."""
        words = [f"--method {quote(self.method)}", self.options]
        if k is not None and "k" in self.definition.options:
            words.append(f"--method-option k={k}")
        if k is not None and "k" in self.definition.objective_options and self.definition.objective.alpha:
            words.append("" if "--k " in self.options else f"--k {k}")
        return " ".join(filter(None, words))


def file_entry(word: str) -> Entry:
    """The entry of a method's name, or of its file. Raises InputError for an unknown one."""
    path = str(Path(word).resolve()) if word.endswith(".py") else word
    return Entry(find_method(path).name, path)


GKD = Entry("gkd", "gkd", "--beta 0.9")
"""The reference of all comparisons."""
TSDKD = Entry("tsdkd", "tsdkd")
MILD = Entry("tsdkd-mild", "tsdkd", "--direct-weight 10 --em-weight 0.01")
"""More of the direct term, less of the entropy term."""
NO_ENTROPY = Entry("tsdkd-no-entropy", "tsdkd", "--em-weight 0")
NO_RANKING = Entry("tsdkd-no-ranking", "tsdkd", "--alpha 0")
COMPLEMENT = Entry("tsdkd-complement", "tsdkd-complement")
