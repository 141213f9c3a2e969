"""A teacher behind a server: what it is, whether its answers can be trusted, and its readings of sequences."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Self

import torch
from transformers import PreTrainedTokenizerBase

from tsdkd.artifacts.manifest import teachers_by_name
from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.observer import Observer
from tsdkd.stages.teacher_server.connection import KEY_VARIABLE, Connection, Json, RefusedError
from tsdkd.stages.teacher_server.fingerprint import difference, fingerprint, same_teacher
from tsdkd.stages.teacher_server.reading import SPARE, LogProbs, Reading, ReadRequest, check_reading, require_finite
from tsdkd.stages.teacher_server.routes import CompletionsRoute, MalformedError, Route, SglangRoute, TokensRoute
from tsdkd.stages.teacher_server.self_test import check_server, check_tokenizer, test_requests

REQUESTS = 16
"""Requests at the same time, unless the user chooses."""
LONGEST_NAME = 200
"""Characters of a model's name."""


class TeacherServer:
    """A served teacher whose answers passed the self-test. A context manager; `read` may be called by one thread."""

    def __init__(
        self,
        url: str,
        name: str | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab: int,
        top_k: int,
        k: int,
        requests: int = REQUESTS,
    ) -> None:
        """Probe and test a server.

        `name`: of the model at the server, needed where it serves several. `tokenizer`, `vocab`: the student's, and the
        number of ids that it knows. `top_k`: log-probabilities per token; `k`: the student's candidates.

        Raises InputError for a server, a model or options that do not fit, TsdkdError for wrong answers.
        """
        self.top_k = top_k
        self._vocab = vocab
        self._connection = Connection(url, requests)
        self._threads = ThreadPoolExecutor(requests)
        try:
            card = self._find_model(name)
            self.model: str = card["id"]
            self.longest: int | None = card.get("max_model_len")
            """Tokens of the longest sequence, one generated token included."""
            self._tests = test_requests(tokenizer, self.longest and self.longest - 1)
            self.route = self._choose_route(str(card.get("owned_by")), k)
            self._asked = self._probe_top_k()
            self.tokenizer_checked = self._check_tokenizer(tokenizer)
            self.fingerprint = check_server(self._tests, self._read_one)
        except BaseException:
            self.close()
            raise

    @property
    def sends_key_in_clear(self) -> bool:
        """Whether the key travels without TLS to another machine."""
        return self._connection.sends_key_in_clear

    @property
    def url(self) -> str:
        return self._connection.url

    def require_length(self, longest: int) -> None:
        """Raises InputError unless the server reads sequences of `longest` tokens."""
        if self.longest is not None and longest >= self.longest:
            raise InputError(
                f"The longest sequence has {longest:,} tokens; the server of {self.model} reads {self.longest - 1:,}.",
                f"Serve it with --max-model-len {longest + 1} or more (SGLang: --context-length).",
            )

    def continue_as(self, recorded: str) -> None:
        """Take over the fingerprint that an artifact records. Raises TsdkdError where another teacher answers."""
        self._require_same(recorded)
        self.fingerprint = recorded

    def read(self, requests: Sequence[ReadRequest], done: Callable[[int], None] = lambda _: None) -> list[Reading]:
        """Readings of sequences, in order. `done` is called with 1 after each.

        Raises TsdkdError where the server is gone, answers wrongly, or answers as another teacher at the end.
        """
        futures = [self._threads.submit(self._read_one, request) for request in requests]
        try:
            readings = []
            for future in futures:
                readings.append(future.result()[0])
                done(1)
            self._require_same(self._fingerprint_now())
            return readings
        except BaseException:
            for future in futures:
                future.cancel()
            self.close()
            raise

    def close(self) -> None:
        self._connection.close()
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_one(
        self, request: ReadRequest, *, next_row: bool = False, temperature: float = 1.0
    ) -> tuple[Reading, LogProbs]:
        raw = self.route.read(request, self._asked, next_row=next_row, temperature=temperature)
        return check_reading(request, raw, self._asked, self.top_k, self._vocab), raw.next_row

    def _fingerprint_now(self) -> str:
        own = [value for request in self._tests for value in self.route.read(request, 1).token_log_probs]
        require_finite(own)
        return fingerprint(torch.tensor(own))

    def _require_same(self, other: str) -> None:
        if not same_teacher(self.fingerprint, other):
            raise TsdkdError(
                f"The server answers as another teacher than before: its log-probabilities of the self-test differ by "
                f"{difference(self.fingerprint, other):.2f} nats per token.",
                f"Serve the same weights of {self.model} again, or start anew with --overwrite.",
            )

    def _find_model(self, name: str | None) -> Json:
        """The model's entry of /v1/models."""
        cards = self._connection.get("/v1/models").get("data")
        if not isinstance(cards, list) or not all(map(_is_card, cards)):
            raise InputError("The server lists no models at /v1/models.", "It must be vLLM or SGLang.")
        names = [card["id"] for card in cards]
        if name is None and len(cards) == 1:
            return dict(cards[0])
        if name in names:
            return dict(cards[names.index(name)])
        served = ", ".join(map(str, names)) or "none"
        cause = f"The server does not serve {name}" if name else f"The server serves {len(names)} models"
        raise InputError(f"{cause}: {served}.", "Name one of them with --teacher.")

    def _choose_route(self, owner: str, k: int) -> Route:
        """SGLang's route; else vLLM's route with the log-probabilities of fixed ids where the server has it."""
        if owner == "sglang":
            return SglangRoute(self._connection, self.model)
        exact, ids = TokensRoute(self._connection, self.model), self._tests[0].ids
        try:
            exact.read(ReadRequest(ids[:2], [1], [list(range(min(k, self._vocab)))]), 1)
        except (RefusedError, MalformedError):  # earlier versions of the route ignore fixed ids
            return CompletionsRoute(self._connection, self.model)
        return exact

    def _probe_top_k(self) -> int:
        """Log-probabilities to ask for: the K that are kept, and spare ones where the server allows them."""
        request = ReadRequest(self._tests[0].ids[:2], [1])
        try:
            self.route.read(request, self.top_k + SPARE)
            return self.top_k + SPARE
        except RefusedError:
            pass
        try:
            self.route.read(request, self.top_k)
            return self.top_k
        except RefusedError as error:
            allowed = re.search(r"max allowed: (\d+)", error.cause)
            if not allowed:
                raise
            raise InputError(
                f"--top-k is {self.top_k}, but the server gives at most {allowed[1]} log-probabilities per token.",
                f"Start vLLM with --max-logprobs {self.top_k + SPARE}, or give --top-k {allowed[1]}.",
            ) from None

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the server lets its tokenizer be compared. Raises InputError for another one than the student's."""

        def tokenize(text: str) -> list[int]:
            body = {"model": self.model, "prompt": text, "add_special_tokens": False}
            return list(self._connection.post("/tokenize", body)["tokens"])

        try:
            check_tokenizer(tokenizer, tokenize)
        except RefusedError:
            return False
        return True


def _is_card(card: object) -> bool:
    """Whether an entry of /v1/models has a name that a manifest can record."""
    name = card.get("id") if isinstance(card, dict) else None
    return isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name.isprintable()


@contextmanager
def open_servers(
    urls: str | Mapping[str, str],
    names: str | Mapping[str, str] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab: int,
    top_k: int,
    k: int,
    observer: Observer,
) -> Iterator[dict[str, TeacherServer]]:
    """The server at the address of each teacher, by the teachers' names, in their order.

    `names`: of the models at the servers, by the teachers' names. Other arguments and errors as for `TeacherServer`.
    """
    served = teachers_by_name(names or {})
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(
                open_server(url, served.get(name), tokenizer, vocab=vocab, top_k=top_k, k=k, observer=observer)
            )
            for name, url in teachers_by_name(urls).items()
        }


def open_server(
    url: str,
    name: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab: int,
    top_k: int,
    k: int,
    observer: Observer,
    requests: int = REQUESTS,
) -> TeacherServer:
    """A tested server, described to the user; arguments and errors as for `TeacherServer`."""
    server = TeacherServer(url, name, tokenizer, vocab=vocab, top_k=top_k, k=k, requests=requests)
    if server.sends_key_in_clear:
        observer.warning(f"The key of {KEY_VARIABLE} travels without TLS to {server.url}.")
    if not server.tokenizer_checked:
        observer.warning("The server does not show its tokenizer, so it is not compared with the student's.")
    ranked = "all candidates are ranked" if server.route.ranks_all else f"candidates outside the top {top_k} are tied"
    observer.info(f"{server.model} is read by {server.route.name}: {ranked}. It passed the self-test.")
    return server
