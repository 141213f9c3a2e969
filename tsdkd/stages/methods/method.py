"""What an objective is: the numbers of its loss, which of them can be chosen, and whose responses it learns from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import InputError

ANY_AUTHOR = ("student", "teacher", "both", "mixture")
DIVERGENCE_ONLY: Mapping[str, Any] = {"alpha": 0.0, "em_weight": 0.0, "gate": False}
"""A divergence at every token alike, and nothing else."""
POLICY_OF_AUTHOR = {
    "student": "--policy student",
    "teacher": "--policy teacher",
    "both": "--policy speculative",
    "mixture": "--policy teacher-mixed",
}
UNMODIFIED_SAMPLING: Mapping[str, Any] = {"temperature": 1.0, "top_p": 1.0, "quantization": None}
"""Sampling with nothing in it but the models' own probabilities, which are what scores record."""


@dataclass(frozen=True)
class Method:
    """One way to distil, with the defaults of its paper."""

    name: str
    title: str
    """Method, authors, place: for the model card."""
    means: str
    """What is learned, in a clause that follows the title."""
    objective: TSDKDConfig
    options: tuple[str, ...]
    """The fields of `objective` that it has."""
    authors: tuple[str, ...] = ANY_AUTHOR
    """Who may have written the recorded responses that are learned from."""
    fresh: bool = True
    """May the student answer during training?"""
    teacher: bool = True
    """Is the teacher's view of the responses needed, or are they enough?"""
    teacher_fraction: float = 0.0
    """Of the distribution that live answers are sampled from, unless said otherwise."""
    replays: bool = False
    """Does a schedule decide when the student answers, and when its answers are learned from again?"""

    def with_options(self, given: Mapping[str, Any]) -> TSDKDConfig:
        """The loss with some options chosen. Raises InputError for one that it does not have, or without effect."""
        for name in given:
            if name not in self.options:
                has = ", ".join(_option(own) for own in self.options) or "no options"
                raise InputError(f"The objective {self.name} has no {_option(name)}.", f"Leave it out; it has {has}.")
        loss = replace(self.objective, **given)
        unused = "skew" if loss.divergence == "jsd" else "beta"
        if unused in given:
            raise InputError(
                f"{_option(unused)} has no effect on the divergence {loss.divergence}.",
                "Leave it out, or choose another --divergence.",
            )
        return loss

    def require(self, loss: TSDKDConfig) -> None:
        """Raise InputError when a loss differs from this objective's in what is no option of it."""
        differs = {f.name: getattr(loss, f.name) for f in fields(loss)}
        self.with_options({name: value for name, value in differs.items() if value != getattr(self.objective, name)})

    def require_authors(self, authors: Iterable[str]) -> None:
        """Raise InputError when recorded responses were written by somebody else than it learns from."""
        if others := sorted(set(authors) - set(self.authors)):
            wanted = " or ".join(POLICY_OF_AUTHOR[author] for author in self.authors)
            raise InputError(
                f"{self.name} does not learn from responses by {' and '.join(others)}, which these rollouts hold.",
                f"Generate them with {wanted}.",
            )

    def require_sampling(self, sampling: Mapping[str, Any]) -> None:
        """Raise InputError when it weighs tokens by the probability they were sampled with, and that is not known."""
        if not self.objective.policy_gradient_weight:
            return
        for name, plain in UNMODIFIED_SAMPLING.items():
            if sampling[name] != plain:
                raise InputError(
                    f"{self.name} must know how likely tokens were sampled, but {name} was {sampling[name]}.",
                    f"Sample with {name} {plain:g}." if plain else f"Sample without {name}.",
                )

    def require_fresh(self, student_fraction: float) -> None:
        """Raise InputError when the student is to answer a share of the prompts that the objective has no use for."""
        if student_fraction and not self.fresh:
            raise InputError(f"{self.name} does not learn from fresh answers.", "Give --rollouts and --lambda 0.")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
