"""A small server with the routes of vLLM and SGLang over any model, and with their faults."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tsdkd.stages.models.load import load_model

LogProbs = Callable[[list[int]], np.ndarray]
"""Token ids -> log-probabilities (len(ids), vocab) of the token after each."""


def random_model(vocab: int, seed: int = 0) -> LogProbs:
    """Random distributions that depend on the last two tokens and on the position."""
    tables = np.random.default_rng(seed).normal(scale=2, size=(3, vocab, vocab))

    def log_probs(ids: list[int]) -> np.ndarray:
        before = [0, *ids[:-1]]
        logits = tables[0, ids] + tables[1, before] + tables[2, np.arange(len(ids)) % vocab]
        values: np.ndarray = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return values

    return log_probs


def model_at(path: Path) -> LogProbs:
    """The model at a path; its padding rows are as improbable as those of a trained model."""
    model = load_model(str(path), "float32")

    def log_probs(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            logits = model.model(torch.tensor([ids])).logits[0]
        logits[:, model.vocab :] = -40
        values: np.ndarray = logits.log_softmax(-1).numpy()
        return values

    return log_probs


@dataclass
class FakeServer:
    """What the server serves, and what goes wrong; tests change it while the server runs."""

    log_probs: LogProbs
    tokenizer: PreTrainedTokenizerBase | None = None
    kind: str = "vllm"
    scale_out: bool = False
    model: str = "served/teacher"
    max_logprobs: int = 20
    max_model_len: int = 512
    key: str = ""
    fault: str = ""
    """At every request: shift, fewer, nan, null, next-nan, above-1, temperature, shifted-candidates, nan-candidates,
    other-ids, no-log-probs, no-fixed-ids, redirect or leak."""
    failures: list[str] = field(default_factory=list)
    """A status, cut, garbled or slow: of the next requests, one each."""
    url: str = ""
    paths: list[str] = field(default_factory=list)
    """Of the requests so far."""
    closing: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serve(fake: FakeServer, port: int = 0) -> Iterator[FakeServer]:
    server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"fake": fake}))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that leave
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        fake.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", -1, True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        fake = self.fake
        fake.paths.append(self.path)
        if self._refused():
            return
        card = {"id": fake.model, "owned_by": fake.kind, "max_model_len": fake.max_model_len}
        self._answer(200, {"data": [card]})

    def do_POST(self) -> None:
        fake = self.fake
        fake.paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        failure = fake.failures.pop(0) if fake.failures else ""
        if self._refused():
            return
        if failure == "slow":
            fake.closing.wait(2)
        if failure.isdecimal():
            self._answer(int(failure), {"error": {"message": "Try again."}}, {"retry-after": "0"})
            return
        routes: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"/tokenize": self._tokenize}
        if fake.kind == "sglang":
            routes["/generate"] = self._sglang
        else:
            routes["/v1/completions"] = self._completions
        if fake.scale_out:
            routes["/inference/v1/generate"] = self._tokens
        if self.path not in routes:
            self._answer(404, {"error": {"message": "Not Found"}})
            return
        garbled = {"content-encoding": "gzip"} if failure == "garbled" else None
        try:
            self._answer(200, routes[self.path](body), garbled, cut=failure == "cut")
        except ValueError as error:
            self._answer(400, {"error": {"message": str(error)}})

    def _refused(self) -> bool:
        fake, sent = self.fake, self.headers.get("authorization", "")
        if fake.closing.is_set():
            self.close_connection = True
        elif fake.fault == "redirect":
            self._answer(307, {}, {"location": "http://elsewhere.invalid/v1"})
        elif fake.key and sent != f"Bearer {fake.key}":
            self._answer(401, {"error": {"message": "Unauthorized"}})
        elif fake.fault == "leak":
            self._answer(400, {"error": {"message": f"Bad header {sent}\x1b[2J"}})
        else:
            return False
        return True

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        data = json.dumps(content).encode()
        if self.fake.fault == "null":
            data = data.replace(b"NaN", b"null")
        self.send_response(status)
        for name, value in {
            "content-type": "application/json",
            "content-length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut

    def _tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.fake.tokenizer is None:
            raise ValueError("no tokenizer")
        return {"tokens": self.fake.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])}

    def _rows(self, ids: list[int], temperature: float) -> np.ndarray:
        """Row i: log-probabilities of the token at i."""
        fake = self.fake
        values = fake.log_probs(ids)
        if fake.fault == "temperature":
            values = values / temperature
            values = values - np.log(np.exp(values).sum(-1, keepdims=True))
        if fake.fault == "above-1":
            values = values + 1
        if fake.fault in {"nan", "null"}:
            values = np.where(np.arange(len(values))[:, None] >= 2, np.nan, values)
        rows = np.roll(values, 1, axis=0)
        return np.roll(rows, 1, axis=0) if fake.fault == "shift" else rows

    def _following(self, ids: list[int], count: int) -> list[tuple[int, float]]:
        """The most likely tokens after a text, with their log-probabilities."""
        row = self.fake.log_probs(ids)[-1]
        return [(i, nan if self.fake.fault == "next-nan" else float(row[i])) for i in self._top(row, count)]

    def _top(self, row: np.ndarray, count: int) -> list[int]:
        if count > self.fake.max_logprobs:
            raise ValueError(
                f"Requested prompt logprobs of {count}, which is greater than max allowed: {self.fake.max_logprobs}"
            )
        order: list[int] = np.argsort(-row, kind="stable")[: count - (self.fake.fault == "fewer")].tolist()
        return order

    def _prompt_logprobs(self, ids: list[int], count: int, temperature: float) -> list[dict[int, Any] | None]:
        entries: list[dict[int, Any] | None] = [None]
        for token, row in zip(ids[1:], self._rows(ids, temperature)[1:], strict=True):
            entry = {token: {"logprob": float(row[token]), "rank": 1 + int((row > row[token]).sum())}}
            top = self._top(row, count)
            values = row[top].tolist()
            entries.append(
                entry
                | {
                    i: {"logprob": value, "rank": rank}
                    for rank, (i, value) in enumerate(zip(top, values, strict=True), 1)
                }
            )
        return entries

    def _completions(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, count = body["prompt"], body["prompt_logprobs"]
        following = self._following(ids, body.get("logprobs", 1))
        choice: dict[str, Any] = {
            "prompt_token_ids": ids[1:] if self.fake.fault == "other-ids" else ids,
            "prompt_logprobs": self._prompt_logprobs(ids, count, body["temperature"]),
            "logprobs": {"top_logprobs": [{f"token_id:{i}": value for i, value in following}]},
        }
        if self.fake.fault == "no-log-probs":
            del choice["prompt_logprobs"]
        return {"model": self.fake.model, "choices": [choice]}

    def _tokens(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, sampling = body["token_ids"], body["sampling_params"]
        fixed = sampling.get("prompt_logprob_token_ids")
        answer: dict[str, Any] = {"model": self.fake.model, "prompt_token_ids": ids}
        answer["prompt_logprobs"] = self._prompt_logprobs(ids, sampling["prompt_logprobs"], sampling["temperature"])
        following = self._following(ids, sampling.get("logprobs", 1))
        top = [{"token_id": i, "logprob": value} for i, value in following]
        answer["choices"] = [{"logprobs": {"content": [{"top_logprobs": top}]}}]
        if fixed is not None and self.fake.fault != "no-fixed-ids":
            first = sampling["prompt_logprob_start"] + 1
            if len(fixed) != len(ids) - first:
                raise ValueError(f"prompt_logprob_token_ids has {len(fixed)} rows")
            rows, asked = self._rows(ids, sampling["temperature"])[first:], np.array(fixed)
            scores = np.where(asked < 0, -np.inf, np.take_along_axis(self._fixed(rows), asked.clip(0), -1))
            with io.BytesIO() as buffer:
                np.save(buffer, scores.astype(np.float32))
                answer["prompt_token_id_logprobs"] = base64.b64encode(buffer.getvalue()).decode()
        return answer

    def _fixed(self, rows: np.ndarray) -> np.ndarray:
        """The rows that give the log-probabilities of fixed ids."""
        if self.fake.fault == "shifted-candidates":
            return np.roll(rows, 1, axis=0)
        return np.full_like(rows, np.nan) if self.fake.fault == "nan-candidates" else rows

    def _sglang(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, start = body["input_ids"], body["logprob_start_len"]
        temperature = body["sampling_params"]["temperature"]
        rows, count = self._rows(ids, temperature), body.get("top_logprobs_num", 0)
        fixed, asked = self._fixed(rows), body.get("token_ids_logprob") or []

        def entries(row: np.ndarray, chosen: list[int]) -> list[list[Any]]:
            return [[float(row[i]), i, None] for i in chosen]

        following, after = self._following(ids, count), range(start + 1, len(ids))
        info: dict[str, Any] = {
            "input_token_logprobs": [
                [None, ids[start], None],
                *([float(rows[i][ids[i]]), ids[i], None] for i in after),
            ],
            "input_top_logprobs": [None, *(entries(rows[i], self._top(rows[i], count)) for i in after)],
            "output_top_logprobs": [[[value, i, None] for i, value in following]],
            "input_token_ids_logprobs": [None, *(entries(fixed[i], asked) for i in after)],
        }
        return {"text": "", "meta_info": info}
