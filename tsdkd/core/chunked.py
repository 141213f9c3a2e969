"""The objective from hidden states: the value and gradients of `token_selective_loss`, chunk by chunk of tokens.

The logits of all tokens never exist. A first pass forms every token's logits once and takes all that its own two
distributions decide: entropies, gate, divergence and the divergence's gradient. Only then is it known which tokens are
in an opener or among the most uncertain, and those alone are read again; all of them for the long-range term, which
weighs a token by what follows it. docs/objective.md derives the gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tsdkd.core.config import TSDKDConfig
from tsdkd.core.gradients import Buffer, divergence_grad, dot, softmax, write_product
from tsdkd.core.head import Head
from tsdkd.core.metrics import loss_metrics, to_grid
from tsdkd.core.objective import require_sampled, weighted_sum
from tsdkd.core.policy_gradient import Sampled, importance_and_rewards, mean_future_rewards
from tsdkd.core.ranking import plackett_luce_grad, plackett_luce_nll, require_candidates
from tsdkd.core.selection import OpenerFraction, check_rows, divergence_weights, select, shares
from tsdkd.core.student import BUFFERS, StudentLogits, WithPrecomputedGradients, differentiable_parts
from tsdkd.core.teacher import TeacherHidden, TeacherLogits, TeacherSignal
from tsdkd.errors import InputError

CHUNK_BYTES = {"cpu": 160_000_000, "cuda": 2**28}
"""Logits of the student that are formed at a time: enough rows for matrix products to run at full speed."""
TEACHER_SHARE = 2
"""The teacher's are formed for a chunk's tokens in as many parts: one product of four is the teacher's."""
BLOCK_LOGITS = {"cpu": 2**18, "cuda": 2**24}
"""Logits of these that are worked on at a time in float32: on a CPU by each thread, in the cache of its core."""
STEP_TOKENS = 64
"""Chunks are multiples of it, which products like, and one of it however little memory is free: with fewer tokens they
only wait for the head's weights."""

Places = tuple[Buffer, ...]
NO_PLACES: Places = (None,) * BUFFERS
"""For compiled code, which keeps few of these results."""


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
    leaves = differentiable_parts(student_hidden, student_head)
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in leaves]
    device = student_hidden.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student_hidden.dtype
    if precision == torch.float16:
        raise InputError("The objective cannot be computed in float16.", "Use bfloat16 or float32.")
    with torch.no_grad(), torch.autocast(device, enabled=False):
        student = StudentLogits(student_hidden, student_head, precision, wanted)
        chunk = chunk or _chunk_tokens(student)
        share = shares(response_mask)[response_mask].to(student.wide) / len(response_mask)
        seen = _read(student, teacher, share, config, chunk, compiled, sampled)
        weights = select(
            to_grid(seen.student_entropy, response_mask),
            to_grid(seen.teacher_entropy, response_mask),
            response_mask,
            config,
            opener_fraction,
        )
        ranking, divergence, certainty = (
            w[response_mask] / len(response_mask) for w in (weights.ranking, weights.divergence, weights.entropy)
        )
        divergence = divergence * seen.importance
        to_come = mean_future_rewards(to_grid(seen.reward, response_mask), response_mask)[response_mask]
        credit = config.policy_gradient_weight * divergence * to_come
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
            terms["policy_gradient"] = -(divergence * to_come).sum()
        metrics = loss_metrics(
            seen.student_entropy, seen.teacher_entropy, seen.agreement, weights, response_mask, terms, scores
        )
        loss = weighted_sum(terms, config)
    attached: Tensor = WithPrecomputedGradients.apply(loss, student.gradients, *leaves)  # type: ignore[no-untyped-call]
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


class _Seen(NamedTuple):
    """What the first pass knows of each response token, (tokens,) each."""

    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    divergence: Tensor
    importance: Tensor
    """1 where it is not known how tokens were sampled."""
    reward: Tensor
    """0 there."""


def _joined(pieces: Sequence[_Seen]) -> _Seen:
    return _Seen(*(torch.cat(column) for column in zip(*pieces, strict=True)))


def _read(
    student: StudentLogits,
    teacher: TeacherSignal | TeacherHidden,
    share: Tensor,
    config: TSDKDConfig,
    chunk: int,
    compiled: bool,
    sampled: Sampled | None,
) -> _Seen:
    """First pass; pulls the direct term's gradient. `share` (tokens,) is the 1/L of each token's response."""
    seen: list[_Seen] = []
    room: list[Tensor] = []
    for rows in _slices(len(student.hidden), chunk):
        linear, judged, known = student.linear(rows), teacher.take(rows), sampled and sampled.take(rows)
        found: list[_Seen] = []
        for part in _slices(len(linear), -(-chunk // TEACHER_SHARE)):
            chosen = known and known.take(part)
            found += _read_part(student, linear[part], judged.take(part), room, config, compiled, chosen)
        seen.append(_joined(found))
        if config.direct_weight and student.learns:
            weights, _ = divergence_weights(seen[-1].student_entropy, seen[-1].teacher_entropy, share[rows], config)
            student.pull(rows, linear, config.direct_weight / config.temperature * weights * seen[-1].importance)
    return _joined(seen)


def _read_part(
    student: StudentLogits,
    linear: Tensor,
    teacher: TeacherSignal | TeacherHidden,
    room: list[Tensor],
    config: TSDKDConfig,
    compiled: bool,
    sampled: Sampled | None,
) -> list[_Seen]:
    """A chunk's tokens of which the teacher's logits exist at a time; `linear` becomes the divergence's gradient.

    `room` keeps one place for these logits.
    """
    if isinstance(teacher, TeacherHidden):
        head = teacher.head.cut
        if not room:
            room.append(head.weight.new_empty(len(teacher), len(head.weight)))
        told = head.linear(teacher.hidden, out=room[0][: len(teacher)])
        if compiled and _by_kernel(linear):
            return [_fused(linear, student.head, told, head, config, sampled)]
    found = []
    for block in _slices(len(linear), _block_tokens(student)):
        places = NO_PLACES if compiled else _places(student, len(linear[block]))
        view = TeacherLogits(head.bend(told[block])) if isinstance(teacher, TeacherHidden) else teacher.take(block)
        found.append(_read_block(linear[block], view, student.head, config, places, sampled and sampled.take(block)))
    return found


def _read_block(
    linear: Tensor,
    teacher: TeacherSignal,
    head: Head,
    config: TSDKDConfig,
    places: Places,
    sampled: Sampled | None,
) -> _Seen:
    """Some tokens (n,); `linear` (n, vocab) becomes the divergence's gradient, where that has a weight.

    It is the gradient at the tempered logits before a soft-cap.
    """
    logits = head.bend(linear)
    steepness = head.steepness(logits)
    if isinstance(teacher, TeacherLogits):
        compare = _compiled(_compare) if places is NO_PLACES else _compare
        return compare(logits, teacher, steepness, config, linear, places, sampled)
    q, log_q = softmax(logits, config.temperature, *places[:2])
    student_entropy = -dot(q, log_q, places[2])
    teacher_entropy = teacher.entropy(config.temperature).to(student_entropy)
    agreement = teacher.agrees(logits)
    divergence = torch.zeros_like(student_entropy)
    if config.direct_weight:
        with torch.enable_grad():
            leaf = log_q.detach().requires_grad_()
            divergence = teacher.divergence(leaf, config.formula, config.temperature)
            (pull,) = torch.autograd.grad(divergence.sum(), leaf)
        write_product(linear, pull.sub_(q.mul_(pull.sum(-1, keepdim=True))), steepness)
    return _Seen(student_entropy, teacher_entropy, agreement, divergence.detach(), *_unjudged(student_entropy))


def _compare(
    logits: Tensor,
    teacher: TeacherLogits,
    steepness: Tensor | None,
    config: TSDKDConfig,
    out: Tensor,
    places: Places,
    sampled: Sampled | None,
) -> _Seen:
    """`_read_block` with both distributions at hand, in as few sweeps over the vocabulary as the closed forms need."""
    agreement = teacher.agrees(logits)
    q, log_q = softmax(logits, config.temperature, *places[:2])
    p, log_p = softmax(teacher.logits, config.temperature, *places[2:4])
    student_entropy, teacher_entropy = -dot(q, log_q, places[4]), -dot(p, log_p, places[4])
    judged = (
        importance_and_rewards(sampled.of(log_q), sampled.of(log_p), sampled) if sampled else _unjudged(student_entropy)
    )
    if config.direct_weight:
        divergence = divergence_grad(q, log_q, p, log_p, config.formula, steepness, places[4], out)
    else:
        divergence = torch.zeros_like(student_entropy)
    return _Seen(student_entropy, teacher_entropy, agreement, divergence, *judged)


def _unjudged(like: Tensor) -> tuple[Tensor, Tensor]:
    """Importance and reward of tokens (n,) of which it is not known how they were sampled."""
    return torch.ones_like(like), torch.zeros_like(like)


@cache
def _compiled(function: Callable[..., _Seen]) -> Callable[..., _Seen]:
    """The same function as fused loops in C++; a compiler is needed."""
    return torch.compile(function)


def _by_kernel(linear: Tensor) -> bool:
    """Is it for the Triton kernel, not for compiled loops? The kernel computes in float32."""
    return linear.is_cuda and linear.dtype != torch.float64


def _fused(
    linear: Tensor, head: Head, told: Tensor, teacher_head: Head, config: TSDKDConfig, sampled: Sampled | None
) -> _Seen:
    """As `_read_block`, from both linear layers' outputs, in float32."""
    from tsdkd.core.triton_kernel import compare

    spoken = [each.bend(sampled.of(said)) for each, said in ((head, linear), (teacher_head, told))] if sampled else []
    found = compare(linear, head, told, teacher_head, config.formula, config.temperature)
    if not sampled:
        return _Seen(*found[:4], *_unjudged(found.divergence))
    sums = found.student_log_sum, found.teacher_log_sum
    now, teacher = (z.float() / config.temperature - log_sum for z, log_sum in zip(spoken, sums, strict=True))
    return _Seen(*found[:4], *importance_and_rewards(now, teacher, sampled))


def _read_again(
    student: StudentLogits,
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
    student: StudentLogits,
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
    slopes = slopes * plackett_luce_grad(scores, "ranking" in config.released)
    steepness = student.head.steepness(chosen)
    student.pull_at(rows, ids, slopes if steepness is None else slopes * steepness)
    return scores


def _sharpen(
    student: StudentLogits, rows: Tensor, linear: Tensor, entropies: Tensor, weights: Tensor, config: TSDKDConfig
) -> None:
    """Pull the entropy term's gradient, dH/dz = -q (log q + H)."""

    def slope(block: slice, q: Tensor, log_q: Tensor) -> Tensor:
        return log_q.add_(entropies[block].unsqueeze(-1)).mul_(q)

    _pull_by_block(student, rows, linear, -config.em_weight / config.temperature * weights, config.temperature, slope)


def _encourage(student: StudentLogits, rows: Tensor, linear: Tensor, ids: Tensor, credit: Tensor) -> None:
    """Pull the long-range term's gradient, `-credit dlog q(y)/dz = credit (q - [y])`."""

    def slope(block: slice, q: Tensor, _: Tensor) -> Tensor:
        chosen = ids[block].unsqueeze(-1)
        return q.scatter_add_(-1, chosen, -torch.ones_like(chosen, dtype=q.dtype))

    _pull_by_block(student, rows, linear, credit, 1.0, slope)


def _pull_by_block(
    student: StudentLogits,
    rows: Tensor,
    linear: Tensor,
    scale: Tensor,
    temperature: float,
    slope_of: Callable[[slice, Tensor, Tensor], Tensor],
) -> None:
    """Pull `scale` (n,) times a gradient at the tempered logits, which `slope_of` forms from q and log q of a block."""
    for block in _slices(len(rows), _block_tokens(student)):
        logits = student.head.bend(linear[block])
        slope = slope_of(block, *softmax(logits, temperature, *_places(student, len(logits))[:2]))
        write_product(linear[block], slope, student.head.steepness(logits))
    student.pull(rows, linear, scale)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _places(student: StudentLogits, tokens: int) -> Places:
    return student.places(tokens, _block_tokens(student))


def _block_tokens(student: StudentLogits) -> int:
    return min(_at_once(student) * max(1, _by_device(BLOCK_LOGITS, student) // student.vocab), len(student.hidden))


def _ranked_tokens(student: StudentLogits, teacher: TeacherSignal | TeacherHidden, k: int) -> int:
    """Ranking gathers k rows of a head for each token."""
    widths = [tensor.shape[-1] for tensor in (student.hidden, getattr(teacher, "hidden", None)) if tensor is not None]
    return max(1, _at_once(student) * _by_device(BLOCK_LOGITS, student) // (k * max(widths)))


def _at_once(student: StudentLogits) -> int:
    return torch.get_num_threads() if student.hidden.device.type == "cpu" else 1


def _by_device(sizes: dict[str, int], student: StudentLogits) -> int:
    return sizes["cpu" if student.hidden.device.type == "cpu" else "cuda"]


def _chunk_tokens(student: StudentLogits) -> int:
    """Chunks of nearly even size; on CPUs always the same, so that a run gives the same bytes twice."""
    tokens, device = len(student.hidden), student.hidden.device
    room = _by_device(CHUNK_BYTES, student)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        room = min(room, (torch.cuda.mem_get_info(device)[0] + cached) // 8)
    most = max(1, room // (student.vocab * student.hidden.itemsize * STEP_TOKENS))
    steps = -(-tokens // STEP_TOKENS)
    return STEP_TOKENS * -(-steps // -(-steps // most))
