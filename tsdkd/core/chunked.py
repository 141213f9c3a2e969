"""The objective from hidden states: the value and gradients of `token_selective_loss`, chunk by chunk of tokens.

The logits of all tokens never exist. A first pass forms every token's logits once and takes all that its own two
distributions decide: entropies, gate, divergence and the divergence's gradient. Only then is it known which tokens are
in an opener or among the most uncertain, and those alone are read again; all of them for the long-range term, which
weighs a token by what follows it. docs/objective.md derives the gradients.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tsdkd.core.config import Divergence, TSDKDConfig
from tsdkd.core.head import Head
from tsdkd.core.long_range import Sampled, judge, rewards_to_come
from tsdkd.core.objective import grid, report, require_sampled, weighted_sum
from tsdkd.core.ranking import plackett_luce_nll, plackett_luce_slope, require_candidates
from tsdkd.core.selection import OpenerFraction, check_rows, divergence_weights, select, shares
from tsdkd.core.teacher import TeacherHidden, TeacherLogits, TeacherSignal
from tsdkd.errors import InputError

CHUNK_BYTES = {"cpu": 160_000_000, "cuda": 2**28}
"""Logits of the student that are formed at a time: enough rows for matrix products to run at full speed."""
TEACHER_SHARE = 2
"""The teacher's are formed for a chunk's tokens in as many parts: one product of four is the teacher's."""
BLOCK_LOGITS = {"cpu": 2**20, "cuda": 2**25}
"""Logits of these that are worked on at a time in float32; on a CPU they stay in its cache."""
STEP_TOKENS = 64
"""Chunks are multiples of it, which products like, and one of it however little memory is free: with fewer tokens they
only wait for the head's weights."""

Scratch = tuple[Tensor | None, ...]
NO_SCRATCH: Scratch = (None,) * 5
"""For compiled code, which keeps few of these results and finds its own memory for them."""


def tsdkd_loss_from_hidden(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    response_mask: Tensor,
    config: TSDKDConfig,
    opener_fraction: OpenerFraction | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`tsdkd_loss` from hidden states after the last norm: same value and gradients, no (batch, seq, vocab).

    Args:
        student_hidden: (batch, seq, width), aligned to the positions they predict.
        student_head: its weight and bias receive gradients where they require them.
        teacher_hidden: (batch, seq, teacher width); no gradient flows to the teacher.
        teacher_head: of the same vocabulary.
        response_mask: bool (batch, seq), True at response tokens; anything may stand elsewhere.
        config, opener_fraction: as in `tsdkd_loss`.

    Returns:
        The loss and the metrics of `token_selective_loss`.

    Raises:
        InputError: shapes that do not fit, a row without response tokens, k not below the vocabulary.
    """
    if not student_hidden.shape[:2] == teacher_hidden.shape[:2] == response_mask.shape:
        raise InputError(
            f"Student hidden states are {tuple(student_hidden.shape)}, the teacher's {tuple(teacher_hidden.shape)}, "
            f"the mask {tuple(response_mask.shape)}.",
            "Align all three to the same (batch, seq).",
        )
    mask = response_mask.bool()
    return token_selective_loss_from_hidden(
        student_hidden[mask],
        student_head,
        TeacherHidden(teacher_hidden[mask], teacher_head),
        mask,
        config,
        opener_fraction,
    )


def token_selective_loss_from_hidden(
    student_hidden: Tensor,
    student_head: Head,
    teacher: TeacherSignal | TeacherHidden,
    response_mask: Tensor,
    config: TSDKDConfig,
    opener_fraction: OpenerFraction | None = None,
    chunk: int | None = None,
    compiled: bool = False,
    sampled: Sampled | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`token_selective_loss` from the student's hidden states (tokens, width), for any form of teacher.

    The student's matrix products run in autocast's precision, else its hidden states', the teacher's in its head's;
    everything else in float32 or better. `chunk` is the number of tokens per matrix product; by default it follows
    from `CHUNK_BYTES` and free memory. `compiled` fuses the work between the products, which pays off after some
    seconds of compilation; it needs a teacher in hidden states. The loss can be differentiated once.

    Raises:
        InputError: a row without response tokens, k not below the vocabulary, tokens or vocabularies that do not fit,
            float16 (the gradients of single tokens vanish in it), `compiled` for a recorded teacher.
    """
    check_rows(response_mask)
    _check(student_hidden, student_head, teacher, int(response_mask.sum()), compiled)
    sampled = require_sampled(sampled, teacher, config)
    if config.alpha:
        require_candidates(config.k, len(student_head.cut.weight))
    parts = _parts(student_hidden, student_head)
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in parts]
    device = student_hidden.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student_hidden.dtype
    if precision == torch.float16:
        raise InputError("The objective cannot be computed in float16.", "Use bfloat16 or float32.")
    with torch.no_grad(), torch.autocast(device, enabled=False):
        student = _Student(student_hidden, student_head, precision, wanted)
        chunk = chunk or _chunk_tokens(student)
        share = shares(response_mask)[response_mask].to(student.wide) / len(response_mask)
        seen = _read(student, teacher, share, config, chunk, compiled, sampled)
        weights = select(
            grid(seen.student_entropy, response_mask),
            grid(seen.teacher_entropy, response_mask),
            response_mask,
            config,
            opener_fraction,
        )
        ranking, divergence, certainty = (
            w[response_mask] / len(response_mask) for w in (weights.ranking, weights.divergence, weights.entropy)
        )
        divergence = divergence * seen.importance
        to_come = rewards_to_come(grid(seen.reward, response_mask), response_mask)[response_mask]
        credit = config.long_range_weight * divergence * to_come
        again = (ranking, certainty, credit)
        scores = _read_again(student, teacher, again, seen.student_entropy, sampled, config, chunk)
        terms: dict[str, Tensor] = {}
        if scores is not None:
            terms["indirect"] = (ranking[ranking > 0] * plackett_luce_nll(scores, "ranking" in config.released)).sum()
        if config.direct_weight:
            terms["direct"] = (divergence * seen.divergence).sum()
        if config.em_weight:
            terms["entropy"] = (certainty * seen.student_entropy).sum()
        if sampled:
            terms["long_range"] = -(divergence * to_come).sum()
        metrics = report(
            seen.student_entropy, seen.teacher_entropy, seen.agreement, weights, response_mask, terms, scores
        )
        loss = weighted_sum(terms, config)
    attached: Tensor = _WithGradients.apply(loss, student.gradients, *parts)  # type: ignore[no-untyped-call]
    return attached, metrics


def _check(hidden: Tensor, head: Head, teacher: TeacherSignal | TeacherHidden, tokens: int, compiled: bool) -> None:
    if not len(hidden) == len(teacher) == tokens:
        raise InputError(
            f"The mask has {tokens} response tokens, the student {len(hidden)}, the teacher {len(teacher)}.",
            "Pass the rows of the mask's True positions, of both models.",
        )
    if isinstance(teacher, TeacherHidden):
        sizes = [len(each.cut.weight) for each in (head, teacher.head)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"The student's head has {sizes[0]} tokens, the teacher's {sizes[1]}.",
                "Give both heads the shared vocab_size.",
            )
    elif compiled:
        raise InputError(
            "The compiled objective needs the teacher's hidden states.",
            "Leave out --compile, or score with --signal hidden.",
        )


def _parts(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor | None]:
    return hidden, head.weight, head.bias


class _WithGradients(torch.autograd.Function):
    """A value whose gradients were computed along with it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *_: Tensor | None) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("The chunked loss gives its gradients away: it can be differentiated once.")
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(None if gradient is None else gradient.mul_(upstream) for gradient in gradients)


class _Student:
    """The student's response tokens and head without autograd; gradients of the linear layer gather here."""

    def __init__(self, hidden: Tensor, head: Head, precision: torch.dtype, wanted: list[bool]) -> None:
        self.hidden = hidden.to(precision)
        self.head = head.cut.to(precision)
        self.wide = torch.promote_types(precision, torch.float32)
        self._parts = _parts(hidden, head)
        self._sums = [
            torch.zeros_like(part, dtype=torch.promote_types(part.dtype, torch.float32))
            if want and part is not None
            else None
            for part, want in zip(self._parts, wanted, strict=True)
        ]
        self._room: Tensor | None = None
        self._scratch: Tensor | None = None

    def scratch(self, tokens: int) -> Scratch:
        """Five places (tokens, vocab), valid until the next call: fresh memory for each block would cost more."""
        if self._scratch is None:
            self._scratch = self.hidden.new_empty(5, _block_tokens(self), self.vocab, dtype=self.wide)
        return tuple(self._scratch[:, :tokens])

    @property
    def vocab(self) -> int:
        return len(self.head.weight)

    @property
    def gradients(self) -> list[Tensor | None]:
        """Of hidden states, weight and bias, in their dtypes."""
        pairs = zip(self._sums, self._parts, strict=True)
        return [None if total is None or part is None else total.to(part.dtype) for total, part in pairs]

    def linear(self, rows: Tensor | slice) -> Tensor:
        """What the linear layer says of some tokens: (n, vocab), valid until the next call."""
        hidden = self.hidden[rows]
        if self._room is None or len(self._room) < len(hidden):
            self._room = hidden.new_empty(len(hidden), self.vocab)
        return self.head.linear(hidden, out=self._room[: len(hidden)])

    @property
    def learns(self) -> bool:
        return any(total is not None for total in self._sums)

    def pull(self, rows: Tensor | slice, slopes: Tensor) -> None:
        """Add what `slopes` (n, vocab), the loss's gradient at the linear layer, means further down."""
        hidden, weight, bias = self._sums
        if hidden is not None:
            hidden[rows] += slopes @ self.head.weight
        if weight is not None:
            into = weight[: self.vocab]
            if slopes.dtype == into.dtype:
                into.addmm_(slopes.T, self.hidden[rows])
            else:
                into += slopes.T @ self.hidden[rows]
        if bias is not None:
            bias[: self.vocab] += slopes.sum(0, dtype=bias.dtype)

    def pull_at(self, rows: Tensor, ids: Tensor, slopes: Tensor) -> None:
        """As `pull`, for slopes (n, k) at few `ids` (n, k)."""
        hidden, weight, bias = self._sums
        if hidden is not None:
            hidden[rows] += torch.einsum("nk,nkd->nd", slopes, self.head.weight[ids].to(slopes))
        if weight is not None:
            outer = slopes.unsqueeze(-1) * self.hidden[rows].to(slopes).unsqueeze(1)
            weight.index_add_(0, ids.flatten(), outer.flatten(0, 1).to(weight))
        if bias is not None:
            bias.index_add_(0, ids.flatten(), slopes.flatten().to(bias))


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the first pass knows of each response token, (tokens,) each."""

    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    divergence: Tensor
    importance: Tensor
    """1 where it is not known how tokens were sampled."""
    reward: Tensor
    """0 there."""


def _read(
    student: _Student,
    teacher: TeacherSignal | TeacherHidden,
    share: Tensor,
    config: TSDKDConfig,
    chunk: int,
    compiled: bool,
    sampled: Sampled | None,
) -> _Seen:
    """First pass; pulls the direct term's gradient. `share` (tokens,) is the 1/L of each token's response."""
    seen: list[tuple[Tensor, ...]] = []
    room: list[Tensor] = []
    for rows in _slices(len(student.hidden), chunk):
        linear, judged, shared = student.linear(rows), teacher.take(rows), share[rows]
        known = sampled.take(rows) if sampled else None
        for part in _slices(len(linear), -(-chunk // TEACHER_SHARE)):
            view = _view(judged.take(part), room)
            for block in _slices(len(linear[part]), _block_tokens(student)):
                scratch = NO_SCRATCH if compiled else student.scratch(len(linear[part][block]))
                chosen = known.take(part).take(block) if known else None
                found = linear[part][block], view(block), shared[part][block]
                seen.append(_read_block(*found, student.head, config, scratch, chosen))
        if config.direct_weight and student.learns:
            student.pull(rows, linear)
    return _Seen(*(torch.cat(column) for column in zip(*seen, strict=True)))


def _view(teacher: TeacherSignal | TeacherHidden, room: list[Tensor]) -> Callable[[slice], TeacherSignal]:
    """What a chunk's teacher says of some of its tokens; its logits take the one place that `room` keeps."""
    if not isinstance(teacher, TeacherHidden):
        return teacher.take
    head = teacher.head.cut
    if not room:
        room.append(head.weight.new_empty(len(teacher), len(head.weight)))
    linear = head.linear(teacher.hidden, out=room[0][: len(teacher)])
    return lambda block: TeacherLogits(head.bend(linear[block]))


def _read_block(
    linear: Tensor,
    teacher: TeacherSignal,
    share: Tensor,
    head: Head,
    config: TSDKDConfig,
    scratch: Scratch,
    sampled: Sampled | None,
) -> tuple[Tensor, ...]:
    """The fields of `_Seen` for some tokens (n,); `linear` (n, vocab) becomes the direct term's gradient there."""
    logits = head.bend(linear)
    steepness = config.direct_weight / config.temperature * head.steepness(logits)
    if isinstance(teacher, TeacherLogits):
        compare = _compiled(_compare) if scratch is NO_SCRATCH else _compare
        return compare(logits, teacher, share, steepness, config, linear, scratch, sampled)
    agreement = teacher.agrees(logits)
    q, log_q = _softmax(logits, config.temperature, scratch[:2])
    student_entropy = -_dot(q, log_q, scratch[2])
    teacher_entropy = teacher.entropy(config.temperature).to(student_entropy)
    divergence = torch.zeros_like(student_entropy)
    if config.direct_weight:
        with torch.enable_grad():
            leaf = log_q.detach().requires_grad_()
            divergence = teacher.divergence(leaf, config.formula, config.temperature)
            (pull,) = torch.autograd.grad(divergence.sum(), leaf)
        slope = pull.sub_(q.mul_(pull.sum(-1, keepdim=True)))
        weights, _ = divergence_weights(student_entropy, teacher_entropy, share, config)
        torch.mul(slope, weights.unsqueeze(-1) * steepness, out=linear)
    return student_entropy, teacher_entropy, agreement, divergence.detach(), *_unjudged(student_entropy)


def _compare(
    logits: Tensor,
    teacher: TeacherLogits,
    share: Tensor,
    steepness: Tensor | float,
    config: TSDKDConfig,
    out: Tensor,
    scratch: Scratch,
    sampled: Sampled | None,
) -> tuple[Tensor, ...]:
    """`_read_block` with both distributions at hand, in as few sweeps over the vocabulary as the closed forms need."""
    agreement = teacher.agrees(logits)
    q, log_q = _softmax(logits, config.temperature, scratch[:2])
    p, log_p = _softmax(teacher.logits, config.temperature, scratch[2:4])
    student_entropy, teacher_entropy = -_dot(q, log_q, scratch[4]), -_dot(p, log_p, scratch[4])
    importance, reward = judge(log_q, log_p, sampled) if sampled else _unjudged(student_entropy)
    if not config.direct_weight:
        return student_entropy, teacher_entropy, agreement, torch.zeros_like(student_entropy), importance, reward
    divergence, slope = _divergence_and_slope(q, log_q, p, log_p, config.formula, scratch[4])
    weights, _ = divergence_weights(student_entropy, teacher_entropy, share, config)
    torch.mul(slope, (weights * importance).unsqueeze(-1) * steepness, out=out)
    return student_entropy, teacher_entropy, agreement, divergence, importance, reward


def _unjudged(like: Tensor) -> tuple[Tensor, Tensor]:
    """Importance and reward of tokens (n,) of which it is not known how they were sampled."""
    return torch.ones_like(like), torch.zeros_like(like)


def _softmax(logits: Tensor, temperature: float, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Softmax of `logits / temperature` (n, vocab) and its logarithm, in float32 or better, with one exponential each.

    `log sum exp` is taken from the likeliest token: its logit less its log-probability.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = logits.to(wide, copy=True) if scratch[1] is None else scratch[1].copy_(logits)
    if temperature != 1:
        log_p /= temperature
    p = torch.softmax(log_p, -1, out=scratch[0])
    log_p -= log_p.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
    return p, log_p


def _divergence_and_slope(
    q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor, formula: Divergence, scratch: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A divergence (n,) and its gradient at the student's tempered logits (n, vocab); consumes its arguments."""
    if formula.mix == 0:
        return _dot(p, log_p.sub_(log_q), scratch), q.sub_(p)
    if formula.mix == 1:
        return _through_softmax(log_q.sub_(log_p), q, scratch)
    log_m = torch.lerp(q, p, formula.mix, out=scratch).clamp_(min=torch.finfo(q.dtype).tiny).log_()
    teacher_ratio, student_ratio = log_p.sub_(log_m), log_q.sub_(log_m)
    if formula.student == 0:
        divergence = _dot(p, teacher_ratio, scratch)
        return divergence, _through_softmax(teacher_ratio.exp_().mul_(formula.mix - 1), q, scratch)[1]
    if formula.teacher == 0:
        divergence = _dot(q, student_ratio, scratch)
        pull = student_ratio.sub_(torch.exp(student_ratio, out=p), alpha=1 - formula.mix)
        return divergence, _through_softmax(pull, q, scratch)[1]
    teacher_side = _dot(p, teacher_ratio, teacher_ratio)
    student_side, slope = _through_softmax(student_ratio, q, scratch)
    return formula.teacher * teacher_side + formula.student * student_side, slope.mul_(formula.student)


def _through_softmax(pull: Tensor, q: Tensor, scratch: Tensor | None) -> tuple[Tensor, Tensor]:
    """A gradient at the probabilities q (n, vocab) -> its mean under q (n,), and the gradient at the logits, in place.

    A constant in `pull` changes nothing there.
    """
    mean = _dot(q, pull, scratch)
    return mean, pull.sub_(mean.unsqueeze(-1)).mul_(q)


def _dot(a: Tensor, b: Tensor, scratch: Tensor | None) -> Tensor:
    return torch.mul(a, b, out=scratch).sum(-1)


@cache
def _compiled(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The same function as fused loops: C++ on a CPU (a compiler is needed), Triton on a GPU."""
    return torch.compile(function)


def _read_again(
    student: _Student,
    teacher: TeacherSignal | TeacherHidden,
    weights: tuple[Tensor, Tensor, Tensor],
    entropies: Tensor,
    sampled: Sampled | None,
    config: TSDKDConfig,
    chunk: int,
) -> Tensor | None:
    """Second pass, over the tokens with a weight (tokens,) in ranking, entropy or long-range term; pulls these.

    Returns the student's tempered logits at its candidates on the opener (n, k), the teacher's favourite first; None
    without a ranking term.
    """
    ranking, certainty, credit = weights
    opener = (ranking > 0) & (config.alpha > 0)
    uncertain = (certainty > 0) & (config.em_weight > 0)
    credited = credit != 0
    rows = (opener | uncertain | credited).nonzero().squeeze(-1)
    scores = []
    for part in _slices(len(rows), chunk):
        linear = student.linear(rows[part])
        ranked, sharpened = opener[rows[part]], uncertain[rows[part]]
        if config.alpha:
            some, chosen = rows[part][ranked], linear[ranked]
            scores += [
                _rank(student, teacher.take(some[few]), some[few], chosen[few], ranking[some[few]], config)
                for few in _slices(len(some), _ranked_tokens(student, teacher, config.k))
            ]
        if config.em_weight and student.learns:
            some = rows[part][sharpened]
            _sharpen(student, some, linear[sharpened], entropies[some], certainty[some], config)
        if sampled and student.learns:
            some = rows[part][credited[rows[part]]]
            _encourage(student, some, linear[credited[rows[part]]], sampled.ids[some], credit[some])
    if not config.alpha:
        return None
    return torch.cat(scores) if scores else entropies.new_empty(0, config.k)


def _rank(
    student: _Student,
    teacher: TeacherSignal | TeacherHidden,
    rows: Tensor,
    linear: Tensor,
    weights: Tensor,
    config: TSDKDConfig,
) -> Tensor:
    """Pull the ranking term's gradient; return the tempered logits (n, k), best first."""
    logits = student.head.bend(linear)
    ids = teacher.ranked(logits, config.k)
    chosen = logits.gather(-1, ids).to(student.wide)
    scores = chosen / config.temperature
    slopes = (config.alpha / config.temperature * weights).unsqueeze(-1)
    slopes = slopes * plackett_luce_slope(scores, "ranking" in config.released)
    student.pull_at(rows, ids, slopes * student.head.steepness(chosen))
    return scores


def _sharpen(
    student: _Student, rows: Tensor, linear: Tensor, entropies: Tensor, weights: Tensor, config: TSDKDConfig
) -> None:
    """Pull the entropy term's gradient, dH/dz = -q (log q + H)."""

    def slope(block: slice, q: Tensor, log_q: Tensor) -> Tensor:
        return log_q.add_(entropies[block].unsqueeze(-1)).mul_(q)

    _pull_by_block(student, rows, linear, -config.em_weight / config.temperature * weights, config.temperature, slope)


def _encourage(student: _Student, rows: Tensor, linear: Tensor, ids: Tensor, credit: Tensor) -> None:
    """Pull the long-range term's gradient, `-credit dlog q(y)/dz = credit (q - [y])`."""

    def slope(block: slice, q: Tensor, _: Tensor) -> Tensor:
        chosen = ids[block].unsqueeze(-1)
        return q.scatter_add_(-1, chosen, -torch.ones_like(chosen, dtype=q.dtype))

    _pull_by_block(student, rows, linear, credit, 1.0, slope)


def _pull_by_block(
    student: _Student,
    rows: Tensor,
    linear: Tensor,
    scale: Tensor,
    temperature: float,
    slope_of: Callable[[slice, Tensor, Tensor], Tensor],
) -> None:
    """Pull `scale` (n,) times a gradient at the tempered logits, which `slope_of` forms from q and log q of a block."""
    for block in _slices(len(rows), _block_tokens(student)):
        logits = student.head.bend(linear[block])
        slope = slope_of(block, *_softmax(logits, temperature, student.scratch(len(logits))[:2]))
        torch.mul(slope, scale[block].unsqueeze(-1) * student.head.steepness(logits), out=linear[block])
    student.pull(rows, linear)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _block_tokens(student: _Student) -> int:
    return max(1, min(_by_device(BLOCK_LOGITS, student) // student.vocab, len(student.hidden)))


def _ranked_tokens(student: _Student, teacher: TeacherSignal | TeacherHidden, k: int) -> int:
    """Ranking gathers k rows of a head for each token."""
    widths = [tensor.shape[-1] for tensor in (student.hidden, getattr(teacher, "hidden", None)) if tensor is not None]
    return max(1, _by_device(BLOCK_LOGITS, student) // (k * max(widths)))


def _by_device(sizes: dict[str, int], student: _Student) -> int:
    return sizes["cpu" if student.hidden.device.type == "cpu" else "cuda"]


def _chunk_tokens(student: _Student) -> int:
    """Chunks of nearly even size; on CPUs always the same, so that a run gives the same bytes twice."""
    tokens, device = len(student.hidden), student.hidden.device
    room = _by_device(CHUNK_BYTES, student)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        room = min(room, (torch.cuda.mem_get_info(device)[0] + cached) // 8)
    most = max(1, room // (student.vocab * student.hidden.itemsize * STEP_TOKENS))
    steps = -(-tokens // STEP_TOKENS)
    return STEP_TOKENS * -(-steps // -(-steps // most))
