"""The features of response tokens, which a method's selection reads. It loads without torch.

`FEATURES` names the values that are formed from both models' distributions, in the first pass and only for methods
that ask for them; `feature_values` forms them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tsdkd.core.losses import SignalName
from tsdkd.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

FEATURES: Mapping[str, SignalName] = {
    "uniform": "responses",
    "student_entropy": "responses",
    "student_log_prob": "responses",
    "teacher_entropy": "ranks",
    "forward_kl": "topk",
    "reverse_kl": "topk",
    "jsd": "topk",
    "teacher_rank": "topk",
    "topk_agreement": "topk",
    "teacher_log_prob": "hidden",
    "hellinger": "hidden",
    "student_outside_mass": "responses",
    "teacher_outside_mass": "hidden",
}
"""Each feature with the least of `losses.SIGNALS` that it is formed from."""
FEATURES_OF_K = ("teacher_rank", "topk_agreement", "student_outside_mass", "teacher_outside_mass")
"""Features that depend on a number k of tokens."""
KNOWN_BEFORE = ("uniform",)
"""Features that no distribution decides, so that they are known before the first pass."""


@dataclass(frozen=True)
class ResponseContext:
    """What a selection reads of responses beside their tokens; training gives all of it."""

    uniform: Tensor | None = None
    """(batch, seq), in [0, 1)"""
    authors: tuple[str, ...] = ()
    prompts: Tensor | None = None
    """(batch,)"""
    step: int = 0
    steps: int = 1
    state: dict[str, Any] = field(default_factory=dict)


NO_CONTEXT = ResponseContext()


@dataclass(frozen=True)
class Features:
    """The features of some responses' tokens: one row for each response, with padding where `mask` is False.

    Tensors are (batch, seq), without gradient, in nats, at temperature 1, and 0 where `mask` is False. Every feature
    that a method declares has its own attribute; one that it does not declare raises InputError.
    """

    mask: Tensor
    """True at response tokens."""
    values: Mapping[str, Tensor]
    """The declared features."""
    context: ResponseContext = NO_CONTEXT

    def _value(self, name: str) -> Tensor:
        if name not in self.values:
            raise InputError(f"The selection reads {name}, which its method does not declare.", "Add it to features.")
        return self.values[name]

    @property
    def position(self) -> Tensor:
        """The number of response tokens before each token."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def length(self) -> Tensor:
        """The number of tokens of each response (batch, 1)."""
        return self.mask.sum(-1, keepdim=True)

    @property
    def authors(self) -> tuple[str, ...]:
        """Who wrote each response: student, teacher, both, mixture or given."""
        return self.context.authors

    @property
    def prompts(self) -> Tensor:
        """The prompt of each response, as a number that responses to the same prompt share (batch,)."""
        if self.context.prompts is None:
            raise InputError(
                "The prompts of these responses are not known.",
                'Give the method scope="batch", or pass them in the ResponseContext.',
            )
        return self.context.prompts

    @property
    def step(self) -> int:
        """The optimizer steps before this one."""
        return self.context.step

    @property
    def steps(self) -> int:
        """The optimizer steps of the whole run."""
        return self.context.steps

    @property
    def state(self) -> dict[str, Any]:
        """The method's state, which `select` may change: numbers, words and lists of them."""
        return self.context.state

    @property
    def uniform(self) -> Tensor:
        """Random numbers in [0, 1); seed, step and response decide them, so a resumed run draws the same."""
        return self._value("uniform")

    @property
    def student_entropy(self) -> Tensor:
        return self._value("student_entropy")

    @property
    def teacher_entropy(self) -> Tensor:
        return self._value("teacher_entropy")

    @property
    def forward_kl(self) -> Tensor:
        """KL(teacher || student). From a recorded top K, this and the other divergences are lower bounds."""
        return self._value("forward_kl")

    @property
    def reverse_kl(self) -> Tensor:
        """KL(student || teacher)."""
        return self._value("reverse_kl")

    @property
    def jsd(self) -> Tensor:
        """Jensen-Shannon divergence, of equal weights."""
        return self._value("jsd")

    @property
    def hellinger(self) -> Tensor:
        """Hellinger distance, in [0, 1]."""
        return self._value("hellinger")

    @property
    def student_log_prob(self) -> Tensor:
        """The student's log-probability of the response's token."""
        return self._value("student_log_prob")

    @property
    def teacher_log_prob(self) -> Tensor:
        """The teacher's log-probability of the response's token."""
        return self._value("teacher_log_prob")

    @property
    def teacher_rank(self) -> Tensor:
        """The teacher's rank of the student's most likely token, 0 the best; k if it is not among the teacher's k."""
        return self._value("teacher_rank")

    @property
    def topk_agreement(self) -> Tensor:
        """The fraction of the student's k most likely tokens among the teacher's k most likely ones."""
        return self._value("topk_agreement")

    @property
    def student_outside_mass(self) -> Tensor:
        """The student's probability outside its k most likely tokens."""
        return self._value("student_outside_mass")

    @property
    def teacher_outside_mass(self) -> Tensor:
        """The teacher's probability outside the student's k most likely tokens."""
        return self._value("teacher_outside_mass")

    def ranks(self, values: Tensor) -> Tensor:
        """The rank of each token within its response by descending values, 0 first; ties go to the earlier token."""
        from tsdkd.core.selection import response_ranks

        return response_ranks(values, self.mask)

    def batch_ranks(self, values: Tensor) -> Tensor:
        """The rank of each token among the tokens of all responses, as in `ranks`; padding comes last."""
        from tsdkd.core.selection import response_ranks

        flat: Tensor = response_ranks(values.reshape(1, -1), self.mask.reshape(1, -1))
        return flat.reshape(self.mask.shape)

    def top_share(self, values: Tensor, share: float) -> Tensor:
        """The tokens of the greatest values of each response, `max(1, ceil(share L))` of its L tokens: a mask."""
        from tsdkd.core.selection import top_entropy_mask

        if not 0 < share <= 1:
            raise InputError(f"The share of tokens is {share}.", "Choose a share in (0, 1].")
        return top_entropy_mask(values, self.mask, share)

    def mean(self, mask: Tensor) -> Tensor:
        """Weights of the mean over the mask's tokens of each response: 1/n at each of n tokens, 0 elsewhere."""
        from tsdkd.core.selection import mean_weights

        return mean_weights(mask & self.mask)

    def batch_mean(self, mask: Tensor) -> Tensor:
        """Weights of the mean over the mask's tokens of all responses: batch/n at each of n tokens, 0 elsewhere.

        Only for methods of scope "batch".
        """
        from tsdkd.core.selection import batch_mean_weights

        return batch_mean_weights(mask & self.mask)
