"""The self-test of a served teacher: known properties of its answers on a few texts, before a run.

Each property holds for every model: the prediction of a token is the same whether the whole text or only the text
before it is sent; log-probabilities do not depend on the temperature; probabilities sum to at most 1.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.teacher_server.fingerprint import VALUES, fingerprint
from tsdkd.stages.teacher_server.reading import LogProbs, Reading, ReadRequest

TEXTS = (
    "The river rises in the hills, runs through three villages and reaches the sea after 214 kilometres.",
    "def area(width, height):\n    return width * height\n\nprint(area(12, 7.5))  # 90.0",
    "Der Zug fährt um 7:45 Uhr ab. ¿Cuánto cuesta el billete? 两张票一共三十六元。",
)
LONGEST = 64
"""Tokens of a text."""
PREFIXES = 3
"""Tokens per text whose prediction is also read from the text before them alone."""
TOLERANCE = 0.15
"""Mean difference of log-probabilities, in nats, that rounding explains; as the engine check allows in bfloat16."""
OTHER_TEMPERATURE = 2.0


class Reader(Protocol):
    """Reads one request, checked."""

    def __call__(
        self, request: ReadRequest, *, next_row: bool = False, temperature: float = 1.0
    ) -> tuple[Reading, LogProbs]: ...


def test_requests(tokenizer: PreTrainedTokenizerBase, longest: int | None) -> list[ReadRequest]:
    """The texts' tokens, at most `longest` each."""
    limit = min(LONGEST, longest or LONGEST)
    texts = [tokenizer.encode(text, add_special_tokens=False)[:limit] for text in TEXTS]
    return [ReadRequest(ids, list(range(1, len(ids)))) for ids in texts]


def check_server(requests: list[ReadRequest], read: Reader) -> str:
    """The fingerprint of the teacher.

    Raises TsdkdError where the server's answers lack a property of log-probabilities, InputError for a short context.
    """
    readings = [read(request)[0] for request in requests]
    for request, reading in zip(requests, readings, strict=True):
        _check_own_tokens(request, reading)
        _check_candidates(request, reading, read)
        _check_alignment(request, reading, read)
    warm = read(requests[0], temperature=OTHER_TEMPERATURE)[0]
    if float((readings[0].top_log_probs - warm.top_log_probs).abs().mean()) > TOLERANCE:
        raise TsdkdError(
            "The teacher's server divides logits by the temperature before it gives log-probabilities.",
            "Start vLLM with --logprobs-mode raw_logprobs, and send requests to it directly.",
        )
    own = torch.cat([reading.token_log_probs for reading in readings])
    if len(own) < VALUES:
        raise InputError(
            f"The server's context holds too few tokens for the self-test: {len(own)}.",
            "Serve the teacher with a longer --max-model-len.",
        )
    return fingerprint(own)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, tokenize: Callable[[str], list[int]]) -> None:
    """Raises InputError where the server's tokenizer is not the student's. `tokenize`: the server's."""
    for text in TEXTS:
        if tokenize(text) != tokenizer.encode(text, add_special_tokens=False):
            raise InputError(
                f"The server's tokenizer is not the student's: it splits {text[:30]!r}… into other ids.",
                "Serve a teacher of the student's family; TSD-KD compares distributions over the same tokens.",
            )


def _check_own_tokens(request: ReadRequest, reading: Reading) -> None:
    """The log-probabilities of the text's own tokens are those in the rows of the most likely ones."""
    own = torch.tensor([request.ids[position] for position in request.positions])
    found = reading.top_ids == own.unsqueeze(-1)
    apart = (reading.top_log_probs - reading.token_log_probs.unsqueeze(-1))[found].abs()
    if len(apart) and float(apart.mean()) > TOLERANCE:
        raise _misaligned("rows of the most likely tokens belong to other positions than the tokens themselves")


def _check_candidates(request: ReadRequest, reading: Reading, read: Reader) -> None:
    """The log-probabilities of candidates are those of the same tokens without candidates."""
    pairs = zip(request.positions, reading.top_ids[:, 0].tolist(), strict=True)
    asked = replace(request, candidates=[[top, request.ids[position]] for position, top in pairs])
    found = read(asked)[0].candidate_log_probs
    expected = torch.stack([reading.top_log_probs[:, 0], reading.token_log_probs], -1)
    if float((found - expected).abs().nanmean()) > TOLERANCE:  # NaN: outside the top K
        raise _misaligned("log-probabilities of candidates belong to other tokens or positions")


def _check_alignment(request: ReadRequest, reading: Reading, read: Reader) -> None:
    """The row of a token is the row that the text before it alone gives for the next token."""
    tops = zip(reading.top_ids.tolist(), reading.top_log_probs.tolist(), strict=True)
    rows = [dict(zip(*top, strict=True)) for top in tops]
    count = len(request.ids)
    for position in sorted({max(2, count * part // (PREFIXES + 1)) for part in range(1, PREFIXES + 1)}):
        following = read(ReadRequest(request.ids[:position], [position - 1]), next_row=True)[1]
        apart = {shift: _distance(following, rows[position - 1 + shift]) for shift in (0, -1, 1)}
        if not apart[0] <= TOLERANCE:  # or NaN
            shifted = min(apart, key=lambda shift: apart[shift])
            if shifted and apart[shifted] <= TOLERANCE:
                raise _misaligned("log-probabilities of a prompt are shifted by one position")
            raise _misaligned(
                "a token has other log-probabilities as part of a prompt than as the next token of the text before it"
            )


def _distance(first: LogProbs, second: LogProbs) -> float:
    """The mean difference of the log-probabilities of tokens in both; infinite where fewer than half are in both."""
    common = first.keys() & second.keys()
    if 2 * len(common) < min(len(first), len(second)):
        return float("inf")
    return sum(abs(first[token] - second[token]) for token in common) / len(common)


def _misaligned(what: str) -> TsdkdError:
    return TsdkdError(
        f"The teacher's server failed the self-test: {what}.",
        "Update the server, start it without speculative decoding, and send requests to it directly.",
    )
