"""JSON over HTTP to one server: a bounded number of connections, retries, and messages that never show the key."""

import os
import random
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakSet

import httpx2

from tsdkd.errors import InputError, TsdkdError
from tsdkd.printable import escape_line

KEY_VARIABLE = "TSDKD_TEACHER_API_KEY"
"""The environment variable of the key. A key for another service is never sent."""
ATTEMPTS = 10
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between attempts; each pause is twice the one before. All attempts take about two minutes of pauses."""
TIMEOUT = httpx2.Timeout(600, connect=10)
"""Seconds. A server with a long queue answers late."""
REPEATED_STATUS = {408, 429, *range(500, 600)}
LONGEST_QUOTE = 300
"""Characters of a server's message that an error repeats."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ServerKind:
    """The words for the servers of one option, and the environment variable of their key."""

    name: str
    option: str
    key_variable: str
    repeats: bool = True
    """Whether a failed request is sent again: a server that was started again gives the same answer."""


TEACHER = ServerKind("teacher's server", "--teacher-url", KEY_VARIABLE)


class RefusedError(TsdkdError):
    """The server refuses a request (status 4xx); the same request is not sent again."""

    def __init__(self, status: int, message: str, remedy: str) -> None:
        super().__init__(message, remedy)
        self.status = status


class Connection:
    """One server by its URL. Thread-safe; a context manager."""

    def __init__(self, url: str, requests: int, kind: ServerKind = TEACHER) -> None:
        """`url`: with or without the final /v1. `requests`: sent at the same time at most.

        Raises InputError for a URL that is no plain http(s) address, and for a key that no header can carry.
        """
        self.url = _base_url(url, kind)
        self._kind, self._key = kind, _key(kind)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        idle = None if kind.repeats else 0  # a server may close an idle connection while a request is sent
        limits = httpx2.Limits(max_connections=requests, max_keepalive_connections=idle)
        self._client = httpx2.Client(headers=headers, limits=limits, timeout=TIMEOUT, follow_redirects=False)
        self._closed = threading.Event()
        self._sockets = WeakSet[socket.socket]()
        self._lock = threading.Lock()

    @property
    def sends_key_in_clear(self) -> bool:
        """Whether a key travels without TLS to another machine."""
        return bool(self._key) and self.url.startswith("http:") and not self.on_loopback

    @property
    def on_loopback(self) -> bool:
        """Whether the server is reached through this machine's loopback."""
        return urlsplit(self.url).hostname in {"localhost", "127.0.0.1", "::1"}

    def get(self, path: str) -> Json:
        """The JSON object at a path, asked for once. Raises InputError where no server responds."""
        try:
            return self._parse(self._client.get(self.url + path, extensions={"trace": self._trace}))
        except httpx2.RequestError as error:
            raise InputError(
                f"No server responds at {self.url} ({self._quote(error)}).",
                f"Check {self._kind.option}, and start the server.",
            ) from None

    def post(self, path: str, body: Json) -> Json:
        """The JSON object that answers a request.

        Repeats it after a lost connection, a timeout, and a status of `REPEATED_STATUS`, unless its kind forbids it.
        Raises RefusedError for another status of 4xx, TsdkdError after the last attempt.
        """
        return self._parse(self._post(path, body, REPEATED_STATUS))

    def command(self, path: str, body: Json | None = None) -> None:
        """Post a request whose answer is its status. Raises RefusedError for one of 4xx or 5xx, else as `post`."""
        self._require_success(self._post(path, body or {}, REPEATED_STATUS - {500}))

    def _post(self, path: str, body: Json, repeated: set[int]) -> httpx2.Response:
        attempts = ATTEMPTS if self._kind.repeats else 1
        for attempt in range(attempts):
            pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.75, 1.25)
            try:
                response = self._client.post(self.url + path, json=body, extensions={"trace": self._trace})
            except httpx2.RequestError as error:
                cause = self._quote(error)
            else:
                if response.status_code not in repeated:
                    return response
                cause = f"status {response.status_code}: {self._quote(_message(response))}"
                pause = max(pause, _retry_after(response))
            if attempt + 1 == attempts or self._closed.wait(pause):
                break
        times = f" {attempts} times" if attempts > 1 else ""
        raise TsdkdError(
            f"The {self._kind.name} at {self.url} failed{times} ({cause}).",
            "Start it again, then run the same command: what is complete is kept.",
        )

    def close(self) -> None:
        """End all requests at once, also those that wait for an answer."""
        with self._lock:
            self._closed.set()
            for connected in self._sockets:
                _shut_down(connected)
        self._client.close()

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        """Remember the sockets of connections: closing the client alone does not wake a thread that reads one."""
        if event in {"connection.connect_tcp.complete", "connection.start_tls.complete"}:
            connected = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets.add(connected)
                if self._closed.is_set():
                    _shut_down(connected)

    def _require_success(self, response: httpx2.Response) -> None:
        status = response.status_code
        if response.is_redirect:
            host = urlsplit(response.headers.get("location", "")).netloc or "another path"
            raise InputError(
                f"The server at {self.url} redirects to {self._quote(host)}.",
                f"Redirects are refused: give the address of the server itself as {self._kind.option}.",
            )
        if status in {401, 403}:
            cause = f"The server at {self.url} refuses access ({status}: {self._quote(_message(response))})."
            raise RefusedError(status, cause, f"Set {self._kind.key_variable} to the server's key.")
        if status >= 400:
            cause = f"The server at {self.url} refuses a request ({status}: {self._quote(_message(response))})."
            raise RefusedError(status, cause, "Read the server's log.")

    def _parse(self, response: httpx2.Response) -> Json:
        self._require_success(response)
        try:
            content = response.json()
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise TsdkdError(
                f"The server at {self.url} does not answer with a JSON object.",
                f"Check that {self._kind.option} names a vLLM or SGLang server.",
            )
        return content

    def _quote(self, text: object) -> str:
        """A server's text for a message: one line, printable, without the key."""
        line = str(text) or type(text).__name__
        if self._key:
            line = line.replace(self._key, "***")
        return escape_line(line[:LONGEST_QUOTE]).rstrip(".")


def _shut_down(connected: socket.socket) -> None:
    with suppress(OSError):  # closed, or replaced by its TLS socket
        connected.shutdown(socket.SHUT_RDWR)


def _base_url(url: str, kind: ServerKind) -> str:
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL:
        parts = httpx2.URL()
    if parts.scheme not in {"http", "https"} or not parts.host:
        raise InputError(f"{kind.option} is no http(s) address.", "Give one such as http://localhost:8000.")
    if parts.userinfo or {"?", "#"} & {*url}:
        raise InputError(
            f"{kind.option} has a user name, a password, a query or a fragment.",
            f"Give the address alone; a key belongs in the environment variable {kind.key_variable}.",
        )
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _key(kind: ServerKind) -> str:
    key = os.environ.get(kind.key_variable, "")
    if not key.isascii() or any(character.isspace() or not character.isprintable() for character in key):
        raise InputError(f"{kind.key_variable} holds characters that no header can carry.", "Set it to the key alone.")
    return key


def _message(response: httpx2.Response) -> str:
    """The message of an error in OpenAI's form, else the text."""
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return response.text


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait for, at most `LONGEST_PAUSE`; 0 where it asks for none."""
    seconds = response.headers.get("retry-after", "")
    return min(float(seconds), LONGEST_PAUSE) if seconds.isdecimal() else 0.0
