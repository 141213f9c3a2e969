"""A method: its losses and selection, or a `TSDKDConfig`; its options and the responses that it learns from.

It loads without torch.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias, get_args

from tsdkd.core.config import TSDKDConfig
from tsdkd.core.features import KNOWN_BEFORE, Features
from tsdkd.core.losses import Loss
from tsdkd.core.selective_objective import Scope, Selected, SelectiveObjective
from tsdkd.errors import InputError, TsdkdError, first_line
from tsdkd.stages.methods.origin import MethodOrigin
from tsdkd.stages.methods.values import Options, OptionValue, option_text, parse_option, require_default, require_name

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


Losses: TypeAlias = Mapping[str, Loss] | Callable[[Options], Mapping[str, Loss]]
Select: TypeAlias = Callable[[Features, Options], Selected]
Update: TypeAlias = Callable[[dict[str, Any], Mapping[str, float], Options], None]


@dataclass(frozen=True)
class Method:
    """One way to distil, with its paper's settings as defaults.

    It has either `losses` with a `select`, or an `objective` with the names of its fields that a user may change.
    docs/write_a_method.md shows how to write one. Raises InputError for a description that does not fit together.
    """

    name: str
    """The value of `train --method`."""
    full_name: str
    """With authors and venue, for the model card."""
    description: str
    """The loss in a clause, which follows the full name in the model card."""
    losses: Losses | None = None
    """The losses by the names that the log shows, or a function of the options that gives them."""
    select: Select | None = None
    """Features and options -> the weight of each token in each loss."""
    features: tuple[str, ...] = ()
    """What `select` reads of the models' distributions; `core.features.FEATURES` lists all."""
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    """Names and defaults of the options, which decide their types; `k` is the number of tokens of features of k."""
    scope: Scope = "response"
    """"batch": `select` is called once per optimizer step, with all its responses, before the first loss. That costs a
    forward of the student, and online of the teacher, if it reads features of the models."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """What `select` and `update` keep across steps, as it is before the first step: numbers, words and lists of them.
    Each saved step contains it. It needs scope "batch"."""
    update: Update | None = None
    """Changes the state after each step; its arguments are the state, the step's mean of each loss, and the options."""
    objective: TSDKDConfig = field(default_factory=TSDKDConfig)
    """Of a method without `losses`: the formula and its settings."""
    objective_options: tuple[str, ...] = ()
    """The fields of `objective` that a user may change."""
    authors: tuple[str, ...] = ANY_AUTHOR
    """Authors of the responses that it learns from; losses with a policy gradient learn from the student's alone."""
    needs_teacher: bool = True
    """Whether it needs scores or a loaded teacher; if not, the teacher's responses suffice."""
    online_responses: bool = True
    """Whether it learns from responses that are sampled during training."""
    uses_replay: bool = False
    """Whether a schedule decides when the student responds, and when earlier responses are learned from again."""
    teacher_fraction: float = 0.0
    """The default of `train --teacher-fraction`."""
    origin: MethodOrigin | None = None
    """The file or the package that it comes from; None: tsdkd. Loading sets it."""

    def __post_init__(self) -> None:
        require_name("method", self.name)
        for name, default in self.options.items():
            require_name("option", name)
            require_default(name, default)
        if isinstance(self.authors, str) or not self.authors or not set(self.authors) <= set(ANY_AUTHOR):
            raise InputError(
                f"The authors of {self.name} are {self.authors!r:.80}.", f"Give a tuple of {', '.join(ANY_AUTHOR)}."
            )
        if (self.losses is None) != (self.select is None):
            raise InputError(f"The method {self.name} has only one of losses and select.", "Give both.")
        if self.scope not in get_args(Scope):
            raise InputError(f"The scope of {self.name} is {self.scope!r}.", f"Choose of {', '.join(get_args(Scope))}.")
        if isinstance(self.features, str):
            raise InputError(f"The features of {self.name} are one word.", f'Write ("{self.features}",).')
        if (self.state or self.update) and self.scope != "batch":
            raise InputError(f"The method {self.name} has a state, but its scope is a response.", 'Give scope="batch".')
        if self.losses is None and (self.features or self.options or self.state):
            raise InputError(f"The method {self.name} has features, options or a state without losses.", "Give losses.")

    @property
    def is_selective(self) -> bool:
        """Whether it has its own losses and selection."""
        return self.losses is not None

    @property
    def reads_twice(self) -> bool:
        """Whether training reads each micro-batch twice: before the first loss, without gradient, for the selection."""
        return self.scope == "batch" and not set(self.features) <= set(KNOWN_BEFORE)

    def has_policy_gradient(self, options: Options) -> bool:
        """Whether it learns from sampled tokens by a policy gradient, which needs their sampling probabilities."""
        if self.is_selective:
            return self.with_losses(options).has_policy_gradient
        return bool(self.objective.policy_gradient_weight)

    def authors_with(self, options: Options) -> tuple[str, ...]:
        """Authors of the responses that it learns from with these options."""
        return ("student",) if self.is_selective and self.has_policy_gradient(options) else self.authors

    def read_options(self, given: Iterable[str]) -> dict[str, OptionValue]:
        """All options, from "NAME=VALUE" each. Raises InputError for unknown, repeated or ill-typed ones."""
        values: dict[str, OptionValue] = {}
        for text in given:
            name, equals, value = text.partition("=")
            if not equals or name not in self.options:
                known = ", ".join(option_text(*item) for item in self.options.items())
                raise InputError(
                    f"--method-option {text!r} is no option of {self.name}.",
                    f"Write NAME=VALUE; it has {known}." if known else "Leave it out: the method declares no options.",
                )
            if name in values:
                raise InputError(f"--method-option {name} is given twice.", "Give it once.")
            values[name] = parse_option(name, value, self.options[name])
        return {**self.options, **values}

    def recorded(self, options: Options) -> dict[str, Any]:
        """What a checkpoint records of the method, as part of its identity."""
        recorded: dict[str, Any] = {"method": self.name}
        if self.is_selective:
            recorded |= {"method_options": [option_text(*item) for item in options.items()], "objective": {}}
        return recorded | ({"method_origin": self.origin.recorded} if self.origin else {})

    def with_losses(self, options: Options) -> SelectiveObjective:
        """The losses and the selection of a method that has some, with its options.

        Errors in the method's own functions become InputError.
        """
        assert self.losses is not None
        assert self.select is not None
        select, losses = self.select, self.losses
        found = self.call("losses", lambda: losses(options)) if callable(losses) else losses
        k = options.get("k", 0)
        return SelectiveObjective(
            losses=found,
            select=lambda features: self.call("select", lambda: select(features, options)),
            features=tuple(self.features),
            k=k if isinstance(k, int) else 0,
            scope=self.scope,
        )

    def updated(self, state: dict[str, Any], terms: Mapping[str, float], options: Options) -> None:
        """Change the state after a step whose losses had these means. Raises InputError if `update` returns a value."""
        update = self.update
        if update is None:
            return
        if self.call("update", lambda: update(state, terms, options)) is not None:
            raise InputError(f"update of the method {self.name} returns a value.", "Change the state that it is given.")

    def require_saved_state(self, state: dict[str, Any]) -> None:
        """Raises InputError for a state that JSON does not give back, such as one with tuples or numbers as keys."""
        try:
            saved = json.loads(json.dumps(state))
        except (TypeError, ValueError):
            saved = None
        if repr(saved) != repr(state):  # NaN equals no value
            raise InputError(
                f"The state of the method {self.name} holds values that cannot be saved.",
                "Keep numbers, strings and lists of them, in dictionaries with strings as keys.",
            )

    def call(self, function: str, call: Callable[[], Any]) -> Any:
        """The result of one of the method's own functions; their errors become InputError."""
        try:
            return call()
        except TsdkdError:
            raise
        except Exception as error:
            raise InputError(
                f"{function} of the method {self.name} fails ({type(error).__name__}: {first_line(error)}).",
                "Correct the method; `tsdkd --debug` shows where it fails.",
            ) from error

    def with_options(self, options: Mapping[str, Any]) -> TSDKDConfig:
        """The objective with some options changed. Raises InputError for an unknown option or one without effect."""
        for name in options:
            if name not in self.objective_options:
                flags = [*map(_flag, self.objective_options), *(f"--method-option {name}" for name in self.options)]
                known = ", ".join(flags) or "no options"
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

    def require_authors(self, authors: Iterable[str], options: Options) -> None:
        """Raise InputError unless it learns from recorded responses by all these authors."""
        known = self.authors_with(options)
        if others := sorted(set(authors) - set(known)):
            policies = " or ".join(POLICY_OF_AUTHOR[author] for author in known)
            raise InputError(
                f"{self.name} does not learn from responses by {' and '.join(others)}, but these rollouts hold some.",
                f"Generate rollouts with {policies}.",
            )

    def require_unmodified_sampling(self, sampling: Mapping[str, Any], options: Options) -> None:
        """Raise InputError for a policy gradient of tokens whose sampling probabilities these settings change."""
        if not self.has_policy_gradient(options):
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
