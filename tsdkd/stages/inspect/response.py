"""One response, token by token: what is taught of it, and what student and teacher see at each of its tokens."""

from dataclasses import dataclass

import numpy as np

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.inspect.recorded import RecordedView, Row
from tsdkd.stages.inspect.selection import Selection, first_ranks, kendall_tau
from tsdkd.stages.inspect.token_texts import TokenTexts, escape_controls

NONE = "none: the objective has no such term"
LEVELS = (0.5, 1.0, 2.0, 3.0, 4.0)
"""Entropies (nats) at which a token gets the next deeper colour."""


@dataclass(frozen=True, slots=True)
class Candidate:
    text: str
    rank: int
    """The teacher's, among the candidates; 1 is its favourite."""


@dataclass(frozen=True, slots=True)
class PositionView:
    """One position as a student and the teacher see it."""

    student_entropy: float
    teacher_entropy: float
    agreement: float
    """Kendall's tau of both orders of the candidates."""
    candidates: list[Candidate]
    """The student's, best first."""

    @property
    def level(self) -> int:
        """How many of `LEVELS` the student's entropy reaches."""
        return sum(self.student_entropy >= bound for bound in LEVELS)


@dataclass(frozen=True, slots=True)
class Token:
    position: int
    """The first token of a response has 1."""
    text: str
    gate: float
    opener: bool
    uncertain: bool
    """Is entropy minimised here?"""
    before: PositionView
    after: PositionView | None


@dataclass(frozen=True, slots=True)
class Response:
    sample_id: str
    finish_reason: str
    author: str
    messages: list[tuple[str, str]]
    """Role and content of the prompt's."""
    objective: TSDKDConfig
    fraction: float
    """The share c of the entropy that the opener was to hold."""
    opener: int
    """Tokens of the opener."""
    tokens: list[Token]
    after: str | None
    """The model that `Token.after` is of."""

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Names and values for a person."""
        tokens, objective = self.tokens, self.objective
        total = sum(token.before.student_entropy for token in tokens)
        held = sum(token.before.student_entropy for token in tokens if token.opener)
        c = f"adaptive, here {self.fraction:g}" if objective.opener == "adaptive" else f"{self.fraction:g}"
        share = held / total if total else 1
        gates = float(np.mean([token.gate for token in tokens]))
        uncertain = ", ".join(str(token.position) for token in tokens if token.uncertain)
        facts = [
            ("sample", self.sample_id),
            ("tokens", f"{len(tokens)}, written by {self.author}, finish reason: {self.finish_reason}"),
            (
                "opener (c)",
                f"{self.opener} token{'s' * (self.opener != 1)} with {share:.1%} of the entropy (c = {c})"
                if self.opener
                else NONE,
            ),
            ("entropy minimised", f"positions {uncertain} (ratio {objective.em_ratio:g})" if uncertain else NONE),
            ("gate", gate_in_words(objective, gates)),
            *_means("", [token.before for token in tokens]),
        ]
        if self.after:
            facts += [("after", self.after), *_means("after: ", [token.after for token in tokens if token.after])]
        return facts


def gate_in_words(objective: TSDKDConfig, mean: float) -> str:
    if not objective.direct_weight:
        return NONE
    return f"mean {mean:.3f} (tau {objective.tau:g})" if objective.gate else "off: every token has weight 1"


def assemble(
    row: Row,
    texts: TokenTexts,
    objective: TSDKDConfig,
    selection: Selection,
    before: RecordedView,
    after: RecordedView | None = None,
    model: str | None = None,
) -> Response:
    """A row of rollouts with what is selected of it, as seen before and perhaps after (by `model`) training."""
    seen = _seen(before, texts, objective.k)
    later = _seen(after, texts, objective.k) if after else [None] * len(seen)
    tokens = [
        Token(
            position=i + 1,
            text=text,
            gate=float(selection.gate[i]),
            opener=i < selection.opener,
            uncertain=bool(selection.uncertain[i]),
            before=seen[i],
            after=later[i],
        )
        for i, text in enumerate(texts.along(row["response_ids"]))
    ]
    messages = [(escape_controls(message["role"]), escape_controls(message["content"])) for message in row["messages"]]
    return Response(
        escape_controls(row["sample_id"]),
        escape_controls(row["finish_reason"]),
        escape_controls(row["author"]),
        messages,
        objective,
        selection.fraction,
        selection.opener,
        tokens,
        model,
    )


def _seen(view: RecordedView, texts: TokenTexts, k: int) -> list[PositionView]:
    ranks = first_ranks(view.ranks, k)
    return [
        PositionView(
            float(student),
            float(teacher),
            float(agreement),
            [Candidate(texts.of(int(token)), int(rank) + 1) for token, rank in zip(tokens[:k], order, strict=True)],
        )
        for student, teacher, agreement, tokens, order in zip(
            view.student_entropy, view.teacher_entropy, kendall_tau(ranks), view.candidates, ranks, strict=True
        )
    ]


def _means(prefix: str, seen: list[PositionView]) -> list[tuple[str, str]]:
    student, teacher = (np.mean([getattr(one, f"{who}_entropy") for one in seen]) for who in ("student", "teacher"))
    agreement = np.mean([one.agreement for one in seen])
    best = np.mean([one.candidates[0].rank == 1 for one in seen])
    return [
        (f"{prefix}entropy", f"student {student:.3f}, teacher {teacher:.3f} nats a token"),
        (f"{prefix}agreement", f"Kendall's tau {agreement:.3f} on all tokens, the same favourite on {best:.1%}"),
    ]
