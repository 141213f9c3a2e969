"""One response token by token: the terms that use each token, and the predictions of student and teacher."""

from dataclasses import dataclass

import numpy as np

from tsdkd.core.config import TSDKDConfig
from tsdkd.printable import escape_controls
from tsdkd.stages.data.turns import response_turns
from tsdkd.stages.inspect.numpy_selection import ResponseSelection, kendall_tau, ranks_of_first
from tsdkd.stages.inspect.recorded import ResponseScores, Rollout
from tsdkd.stages.inspect.token_texts import TokenTexts

TERM_OFF = "none (weight 0)"
ENTROPY_LEVELS = (0.5, 1.0, 2.0, 3.0, 4.0)
"""Student entropies, in nats, at which a token gets the next deeper colour."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that the student proposes."""

    text: str
    rank: int
    """The teacher's rank among the candidates; 1 is the most likely."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """The predictions of student and teacher at one position."""

    student_entropy: float
    """Nats."""
    teacher_entropy: float
    """Nats."""
    agreement: float
    """Kendall's tau of the student's and the teacher's order of the candidates."""
    candidates: list[Candidate]
    """Most likely first, by the student."""

    @property
    def level(self) -> int:
        """The number of `ENTROPY_LEVELS` that the student's entropy reaches."""
        return sum(self.student_entropy >= bound for bound in ENTROPY_LEVELS)


@dataclass(frozen=True, slots=True)
class InspectedToken:
    """One token of a response that is learned."""

    position: int
    """Counted from 1, context included."""
    text: str
    gate: float
    """Weight of the divergence."""
    in_opener: bool
    ends_opener: bool
    in_entropy_term: bool
    before: TokenScores
    """By the recorded student."""
    after: TokenScores | None
    """By the model of `InspectedResponse.after`."""
    context: str = ""
    """The text between the turn before and this token, which is read and not learned."""


@dataclass(frozen=True, slots=True)
class InspectedResponse:
    """A response with its prompt, its selection and its scores."""

    sample_id: str
    finish_reason: str
    author: str
    messages: list[tuple[str, str]]
    """Role and content of the prompt's messages."""
    objective: TSDKDConfig
    opener_fractions: list[float]
    """The fraction c of the entropy that the opener of each turn holds."""
    tokens: list[InspectedToken]
    after: str | None
    """The model that `InspectedToken.after` belongs to."""
    teacher: str = ""
    """The name of the response's teacher; "" for an only one."""

    @property
    def opener_length(self) -> int:
        """Tokens in the openers of all turns."""
        return sum(token.in_opener for token in self.tokens)

    @property
    def summary(self) -> list[tuple[str, str]]:
        """Names and values to show above the response."""
        tokens = self.tokens
        gate_mean = float(np.mean([token.gate for token in tokens]))
        rows = [
            ("sample", self.sample_id),
            *([("teacher", self.teacher)] if self.teacher else []),
            ("tokens", self._describe_tokens()),
            ("opener", self._describe_opener()),
            ("entropy term", self._describe_entropy_term()),
            ("gate", describe_gate(self.objective, gate_mean)),
            *_mean_rows("", [token.before for token in tokens]),
        ]
        if self.after:
            after = [token.after for token in tokens if token.after]
            rows += [("after", self.after), *_mean_rows("after: ", after)]
        return rows

    def _describe_tokens(self) -> str:
        count, turns = len(self.tokens), len(self.opener_fractions)
        context = self.tokens[-1].position - count
        between = f" in {turns} turns, with {context} of context" if context else ""
        author = "given" if self.author == "given" else f"written by {self.author}"
        return f"{count}{between}, {author}, finish reason: {self.finish_reason}"

    def _describe_opener(self) -> str:
        if not self.opener_length:
            return TERM_OFF
        entropies = np.array([token.before.student_entropy for token in self.tokens], dtype=np.float64)
        total = entropies.sum()
        fraction = entropies[[token.in_opener for token in self.tokens]].sum() / total if total else 1
        adaptive = "adaptive, " if self.objective.opener == "adaptive" else ""
        tokens = f"{self.opener_length} token{'s' * (self.opener_length != 1)}"
        fractions = ", ".join(f"{c:g}" for c in dict.fromkeys(self.opener_fractions))
        return f"{tokens} with {fraction:.1%} of the entropy ({adaptive}c = {fractions})"

    def _describe_entropy_term(self) -> str:
        positions = ", ".join(str(token.position) for token in self.tokens if token.in_entropy_term)
        return f"positions {positions} (ratio {self.objective.em_ratio:g})" if positions else TERM_OFF


def describe_gate(objective: TSDKDConfig, mean: float) -> str:
    """The gate of the direct term in a few words, with its mean weight."""
    if not objective.direct_weight:
        return TERM_OFF
    return f"mean {mean:.3f} (tau {objective.tau:g})" if objective.gate else "off: every token has weight 1"


def build_response(
    rollout: Rollout,
    texts: TokenTexts,
    objective: TSDKDConfig,
    selection: ResponseSelection,
    before: ResponseScores,
    after: ResponseScores | None = None,
    after_model: str | None = None,
    teacher: str = "",
) -> InspectedResponse:
    """Join a rollout with its selection and its scores, `before` training and optionally `after` it."""
    scores_before = _token_scores(before, texts, objective.k)
    scores_after = _token_scores(after, texts, objective.k) if after else [None] * len(scores_before)
    token_texts = texts.decode_sequence(rollout["response_ids"])
    turns = response_turns(len(token_texts), rollout["response_mask"])
    positions = [position for turn in turns for position in turn]
    in_opener = [*selection.in_opener.tolist(), False]
    tokens = [
        InspectedToken(
            position=position + 1,
            text=token_texts[position],
            gate=float(selection.gate[i]),
            in_opener=in_opener[i],
            ends_opener=in_opener[i] and (not in_opener[i + 1] or position + 1 not in positions),
            in_entropy_term=bool(selection.in_entropy_term[i]),
            before=scores_before[i],
            after=scores_after[i],
            context="".join(token_texts[positions[i - 1] + 1 if i else 0 : position]),
        )
        for i, position in enumerate(positions)
    ]
    return InspectedResponse(
        escape_controls(rollout["sample_id"]),
        escape_controls(rollout["finish_reason"]),
        escape_controls(rollout["author"]),
        [(escape_controls(message["role"]), escape_controls(message["content"])) for message in rollout["messages"]],
        objective,
        selection.opener_fractions,
        tokens,
        after_model,
        escape_controls(teacher),
    )


def _token_scores(scores: ResponseScores, texts: TokenTexts, k: int) -> list[TokenScores]:
    ranks = ranks_of_first(scores.ranks, k)
    return [
        TokenScores(
            float(student),
            float(teacher),
            float(agreement),
            [
                Candidate(texts.decode(int(token)), int(rank) + 1)
                for token, rank in zip(candidates[:k], token_ranks, strict=True)
            ],
        )
        for student, teacher, agreement, candidates, token_ranks in zip(
            scores.student_entropy, scores.teacher_entropy, kendall_tau(ranks), scores.candidates, ranks, strict=True
        )
    ]


def _mean_rows(prefix: str, scores: list[TokenScores]) -> list[tuple[str, str]]:
    student = np.mean([token.student_entropy for token in scores])
    teacher = np.mean([token.teacher_entropy for token in scores])
    agreement = np.mean([token.agreement for token in scores])
    same_best = np.mean([token.candidates[0].rank == 1 for token in scores])
    return [
        (f"{prefix}mean entropy", f"student {student:.3f}, teacher {teacher:.3f} nats per token"),
        (f"{prefix}agreement", f"Kendall's tau {agreement:.3f}, same best candidate on {same_best:.1%} of the tokens"),
    ]
