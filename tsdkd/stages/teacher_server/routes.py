"""The routes by which servers give log-probabilities of a prompt: vLLM's completions and generate, SGLang's generate.

Each asks for one generated token, the least that all servers accept, at temperature 1 and with neutral sampling
parameters, so that the server's defaults change no log-probability.
"""

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from math import nan
from typing import Any, Protocol

import numpy as np

from tsdkd.errors import TsdkdError
from tsdkd.stages.teacher_server.connection import Connection, Json
from tsdkd.stages.teacher_server.reading import LogProbs, RawReading, ReadRequest

NEUTRAL: Json = {"top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Beside these, penalties that are 0 by default, whatever a model's generation_config.json says."""


class MalformedError(TsdkdError):
    """An answer lacks what was asked for."""


class Route(Protocol):
    """One way to read log-probabilities from a server."""

    name: str
    ranks_all: bool
    """Whether it gives the log-probabilities of fixed ids, so that all candidates are ranked."""

    def read(self, request: ReadRequest, top: int, *, next_row: bool = False, temperature: float = 1.0) -> RawReading:
        """Log-probabilities of the `top` most likely tokens at each position. Raises TsdkdError."""


class CompletionsRoute:
    """vLLM's /v1/completions with `prompt_logprobs`."""

    name, ranks_all = "/v1/completions", False

    def __init__(self, connection: Connection, model: str) -> None:
        self._connection, self._model = connection, model

    def read(self, request: ReadRequest, top: int, *, next_row: bool = False, temperature: float = 1.0) -> RawReading:
        body = {"model": self._model, "prompt": request.ids, "add_special_tokens": False, "max_tokens": 1}
        body |= {"prompt_logprobs": top, "return_token_ids": True, "temperature": temperature, **NEUTRAL, "top_k": 0}
        if next_row:
            body |= {"logprobs": top, "return_tokens_as_token_ids": True}
        with _expected_form():
            answer = self._connection.post("/v1/completions", body)
            _require_model(answer["model"], self._model)
            choice = answer["choices"][0]
            _require_ids(choice["prompt_token_ids"], request.ids)
            rows, own = _prompt_rows(choice["prompt_logprobs"], request, top)
            following = choice["logprobs"]["top_logprobs"][0] if next_row else {}
            after = {int(key.split(":")[1]): _number(value) for key, value in following.items()}
            return RawReading(rows, own, None, after)


class TokensRoute:
    """vLLM's /inference/v1/generate (`--enable-scale-out`), which also gives the log-probabilities of fixed ids."""

    name, ranks_all = "/inference/v1/generate", True

    def __init__(self, connection: Connection, model: str) -> None:
        self._connection, self._model = connection, model

    def read(self, request: ReadRequest, top: int, *, next_row: bool = False, temperature: float = 1.0) -> RawReading:
        sampling = {"max_tokens": 1, "prompt_logprobs": top, "temperature": temperature, "detokenize": False, **NEUTRAL}
        if next_row:
            sampling["logprobs"] = top
        width, first = len(request.candidates[0]) if request.candidates else 0, request.positions[0]
        if width:  # row i is of the token first + i; -1 pads the rows of tokens that are not read
            table = dict(zip(request.positions, request.candidates, strict=True))
            fixed = [table.get(i, [-1] * width) for i in range(first, len(request.ids))]
            sampling |= {"prompt_logprob_token_ids": fixed, "prompt_logprob_start": first - 1}
        body = {"model": self._model, "token_ids": request.ids, "sampling_params": sampling, "return_token_ids": True}
        with _expected_form():
            answer = self._connection.post("/inference/v1/generate", body)
            _require_model(answer["model"], self._model)
            _require_ids(answer["prompt_token_ids"], request.ids)
            rows, own = _prompt_rows(answer["prompt_logprobs"], request, top)
            candidates = None
            if width:
                encoded = base64.b64decode(answer["prompt_token_id_logprobs"], validate=True)
                values = np.load(io.BytesIO(encoded), allow_pickle=False)
                candidates = values[[position - first for position in request.positions]].tolist()
            following = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] if next_row else []
            after = {entry["token_id"]: _number(entry["logprob"]) for entry in following}
            return RawReading(rows, own, candidates, after)


class SglangRoute:
    """SGLang's own /generate."""

    name, ranks_all = "/generate", True

    def __init__(self, connection: Connection, model: str) -> None:
        self._connection = connection

    def read(self, request: ReadRequest, top: int, *, next_row: bool = False, temperature: float = 1.0) -> RawReading:
        with _expected_form():
            info = self._generate(request, {"top_logprobs_num": top}, temperature)
            own = info["input_token_logprobs"]
            rows = [_by_id(entries) for entries in _at_positions(info["input_top_logprobs"], request)]
            own = [_number(value) for value, _, *_ in _at_positions(own, request)]
            following = _by_id(info["output_top_logprobs"][0]) if next_row else {}
            return RawReading(rows, own, self._candidates(request, rows, temperature), following)

    def _candidates(self, request: ReadRequest, rows: list[LogProbs], temperature: float) -> list[list[float]] | None:
        """The candidates' log-probabilities; a second request asks for those outside the top K.

        SGLang takes one list of ids for all positions, so the list holds only these.
        """
        pairs = list(zip(rows, request.candidates, strict=True)) if request.candidates else []
        missing = sorted({token for row, proposed in pairs for token in proposed if token not in row})
        if missing:
            info = self._generate(request, {"token_ids_logprob": missing}, temperature)
            fixed = [_by_id(entries) for entries in _at_positions(info["input_token_ids_logprobs"], request)]
            pairs = [(other | row, proposed) for other, (row, proposed) in zip(fixed, pairs, strict=True)]
        return [[row[token] for token in proposed] for row, proposed in pairs] or None

    def _generate(self, request: ReadRequest, asked: Json, temperature: float) -> Any:
        sampling = {"max_new_tokens": 1, "temperature": temperature, **NEUTRAL, "top_k": -1}
        body = {"input_ids": request.ids, "sampling_params": sampling, "return_logprob": True, **asked}
        body |= {"logprob_start_len": request.positions[0] - 1, "return_text_in_logprobs": False}
        info = self._connection.post("/generate", body)["meta_info"]
        tokens = [entry[1] for entry in info["input_token_logprobs"]][1:]
        sent = request.ids[request.positions[0] :]
        # SGLang reports the last id of its vocabulary as 0
        _require_ids([token or own for token, own in zip(tokens, sent, strict=True)], sent)
        return info


def _at_positions(entries: list[Any], request: ReadRequest) -> list[Any]:
    """SGLang's entries at the positions; the first entry is of the token before the first position."""
    first = request.positions[0]
    if len(entries) != len(request.ids) - first + 1:
        raise _malformed(f"{len(entries)} entries for {len(request.ids) - first + 1} tokens")
    return [entries[position - first + 1] for position in request.positions]


def _by_id(entries: list[Any]) -> LogProbs:
    return {token: _number(value) for value, token, *_ in entries}


def _prompt_rows(entries: list[Any], request: ReadRequest, top: int) -> tuple[list[LogProbs], list[float]]:
    """vLLM's prompt log-probabilities: the rows at the positions, and those of the tokens themselves."""
    if len(entries) != len(request.ids):
        raise _malformed(f"{len(entries)} entries for {len(request.ids)} tokens")
    rows, own = [], []
    for position in request.positions:
        entry, token = entries[position], request.ids[position]
        own.append(_number(entry[str(token)]["logprob"]))
        if (entry[str(token)].get("rank") or 0) > top:  # given beside the most likely tokens
            entry = {key: value for key, value in entry.items() if key != str(token)}
        rows.append({int(key): _number(value["logprob"]) for key, value in entry.items()})
    return rows, own


def _number(log_prob: float | None) -> float:
    """NaN for null, which servers write for it because JSON has no NaN."""
    return nan if log_prob is None else float(log_prob)


def _require_ids(read: list[int], sent: list[int]) -> None:
    if read != sent:
        raise TsdkdError(
            "The teacher's server read other token ids than it received.", "Look for a proxy that changes requests."
        )


def _require_model(answered: str, model: str) -> None:
    if answered != model:
        raise TsdkdError(
            f"The teacher's server answers with the model {answered}, not {model}.",
            f"Serve {model} again, then run the same command.",
        )


@contextmanager
def _expected_form() -> Iterator[None]:
    """Translate the error of an answer that lacks a field."""
    try:
        yield
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        if isinstance(error, TsdkdError):
            raise
        raise _malformed(f"{type(error).__name__}: {error}") from None


def _malformed(what: str) -> MalformedError:
    return MalformedError(
        f"The teacher's server answers without the log-probabilities of the prompt ({what}).",
        "It must be vLLM or SGLang; a proxy may drop them.",
    )
