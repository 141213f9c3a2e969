"""A method: its loss, the options of the loss that can be chosen, and the responses that it learns from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import InputError

ANY_AUTHOR = ("student", "teacher", "both", "mixture", "given")
DIVERGENCE_ONLY: Mapping[str, Any] = {"alpha": 0.0, "em_weight": 0.0, "gate": False}
"""The direct term alone, with the same weight at every token."""
POLICY_OF_AUTHOR = {
    "student": "--policy student",
    "teacher": "--policy teacher",
    "both": "--policy speculative",
    "mixture": "--policy teacher-mixed",
    "given": "--policy given",
}
UNMODIFIED_SAMPLING: Mapping[str, Any] = {"temperature": 1.0, "top_p": 1.0, "quantization": None}
"""Sampling from the probabilities of the models, which scores record."""


@dataclass(frozen=True)
class Method:
    """One way to distil, with its paper's settings as defaults."""

    name: str
    """The value of `train --method`."""
    full_name: str
    """With authors and venue, for the model card."""
    description: str
    """The loss in a clause that follows the full name in the model card."""
    objective: TSDKDConfig
    options: tuple[str, ...]
    """The fields of `objective` that a user may change."""
    authors: tuple[str, ...] = ANY_AUTHOR
    """Authors of the recorded responses that it learns from."""
    needs_teacher: bool = True
    """Whether it needs scores or a loaded teacher; if not, the teacher's responses suffice."""
    online_responses: bool = True
    """Whether it learns from responses that are sampled during training."""
    uses_replay: bool = False
    """Whether a schedule decides when the student responds, and when earlier responses are learned from again."""
    teacher_fraction: float = 0.0
    """The default of `train --teacher-fraction`."""

    def with_options(self, options: Mapping[str, Any]) -> TSDKDConfig:
        """The objective with some options changed. Raises InputError for an unknown option or one without effect."""
        for name in options:
            if name not in self.options:
                known = ", ".join(map(_flag, self.options)) or "no options"
                raise InputError(f"The method {self.name} has no {_flag(name)}.", f"Leave it out; it has {known}.")
        objective = replace(self.objective, **options)
        unused = "skew" if objective.divergence == "jsd" else "beta"
        if unused in options:
            raise InputError(
                f"{_flag(unused)} has no effect on the divergence {objective.divergence}.",
                "Leave it out, or choose another --divergence.",
            )
        return objective

    def require_objective(self, objective: TSDKDConfig) -> None:
        """Raise InputError unless the objective is this method's, but for its options."""
        values = {f.name: getattr(objective, f.name) for f in fields(objective)}
        self.with_options({name: value for name, value in values.items() if value != getattr(self.objective, name)})

    def require_authors(self, authors: Iterable[str]) -> None:
        """Raise InputError unless it learns from recorded responses by all these authors."""
        if others := sorted(set(authors) - set(self.authors)):
            policies = " or ".join(POLICY_OF_AUTHOR[author] for author in self.authors)
            raise InputError(
                f"{self.name} does not learn from responses by {' and '.join(others)}, but these rollouts hold some.",
                f"Generate rollouts with {policies}.",
            )

    def require_unmodified_sampling(self, sampling: Mapping[str, Any]) -> None:
        """Raise InputError when its token weights need sampling probabilities that these settings change."""
        if not self.objective.policy_gradient_weight:
            return
        for name, value in UNMODIFIED_SAMPLING.items():
            if sampling[name] != value:
                raise InputError(
                    f"{self.name} needs the probabilities that tokens were sampled with, "
                    f"but {name} was {sampling[name]}.",
                    f"Sample with {name} {value:g}." if value else f"Sample without {name}.",
                )

    def require_student_fraction(self, student_fraction: float) -> None:
        """Raise InputError when the student would respond during training, and the method does not learn from that."""
        if student_fraction and not self.online_responses:
            raise InputError(
                f"{self.name} does not learn from responses that are sampled during training.",
                "Give --rollouts and --lambda 0.",
            )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
