"""Reading a teacher from a server: all routes against the model itself, faults, keys, and servers that come back."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.models import byte_tokenizer
from tests.helpers.teacher_server import FakeServer, random_model, serve
from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.teacher_server import connection
from tsdkd.stages.teacher_server.connection import KEY_VARIABLE, Connection
from tsdkd.stages.teacher_server.reading import ReadRequest, teacher_ranks
from tsdkd.stages.teacher_server.server import TeacherServer

TOKENIZER = byte_tokenizer()
VOCAB = len(TOKENIZER)
MODEL = random_model(VOCAB + 2)  # two padding rows, which the student does not know
KEY = "sk-Not-A-Secret-0123"


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serve(FakeServer(MODEL, TOKENIZER)) as server:
        yield server


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(connection, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(connection, "ATTEMPTS", 4)
    monkeypatch.setattr(connection, "TIMEOUT", 1.0)


def connect(fake: FakeServer, name: str | None = None, top_k: int = 8, **more: Any) -> TeacherServer:
    settings: dict[str, Any] = {"vocab": VOCAB, "top_k": top_k, "k": 4, "requests": 4}
    return TeacherServer(fake.url, name, TOKENIZER, **settings | more)


def requests(count: int = 6) -> list[ReadRequest]:
    """Sequences of several lengths, with a gap between two turns, and the model's tokens of ranks 40, 0, 9 and 3."""
    result = []
    for i in range(count):
        ids = np.random.default_rng(i).integers(VOCAB, size=9 + i).tolist()
        positions = [2, 3, *range(6, 9 + i)]
        order = np.argsort(-MODEL(ids)[:, :VOCAB])
        result.append(ReadRequest(ids, positions, [order[p - 1][[40, 0, 9, 3]].tolist() for p in positions]))
    return result


@pytest.mark.parametrize(("kind", "scale_out"), [("vllm", False), ("vllm", True), ("sglang", False)])
def test_readings_are_those_of_the_model(fake: FakeServer, kind: str, scale_out: bool) -> None:
    fake.kind, fake.scale_out = kind, scale_out
    asked = requests()
    with connect(fake) as server:
        readings = server.read(asked)
    for request, reading in zip(asked, readings, strict=True):
        rows = torch.from_numpy(MODEL(request.ids)).float()[[p - 1 for p in request.positions]]
        top = rows[:, :VOCAB].topk(8)
        assert reading.top_ids.equal(top.indices)
        torch.testing.assert_close(reading.top_log_probs, top.values)
        own = torch.tensor([request.ids[p] for p in request.positions])
        torch.testing.assert_close(reading.token_log_probs, rows.gather(-1, own[:, None])[:, 0])
        expected = [3, 0, 2, 1] if server.route.ranks_all else [2, 0, 3, 1]  # ties keep the student's order
        assert teacher_ranks(reading.candidate_log_probs).tolist() == [expected] * len(own)
        assert reading.candidate_log_probs.isnan().any() == (not server.route.ranks_all)


def test_tied_candidates_come_last_in_the_order_of_the_student() -> None:
    nan = float("nan")
    assert teacher_ranks(torch.tensor([[nan, -2.0, nan, -1.0]])).tolist() == [[2, 1, 3, 0]]


def test_server_is_probed(fake: FakeServer) -> None:
    with connect(fake) as server:
        assert (server.model, server.longest) == ("served/teacher", 512)
        assert server.route.name == "/v1/completions"
        assert server.tokenizer_checked
        server.require_length(511)
        with pytest.raises(InputError, match="--max-model-len 513"):
            server.require_length(512)
    with pytest.raises(InputError, match=r"does not serve other: served/teacher\. Name one of them with --teacher"):
        connect(fake, "other")


def test_a_server_without_fixed_ids_is_read_by_completions(fake: FakeServer) -> None:
    fake.scale_out, fake.fault = True, "no-fixed-ids"
    with connect(fake) as server:
        assert server.route.name == "/v1/completions"


def test_more_log_probs_than_the_server_gives_are_refused(fake: FakeServer) -> None:
    fake.max_logprobs = 10
    with connect(fake, top_k=10, vocab=VOCAB + 2):
        pass
    with pytest.raises(InputError, match=r"at most 10 log-prob.*--max-logprobs 15, or give --top-k 10"):
        connect(fake, top_k=11)


def test_another_tokenizer_is_refused(fake: FakeServer) -> None:
    fake.tokenizer = byte_tokenizer()
    fake.tokenizer.add_tokens(["river"])
    with pytest.raises(InputError, match="tokenizer is not the student's"):
        connect(fake)
    fake.tokenizer = None
    with connect(fake) as server:
        assert not server.tokenizer_checked


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("shift", "shifted by one position"),
        ("fewer", "11 log-probabilities of a token where 12 were asked for"),
        ("nan", "no finite number"),
        ("null", "no finite number"),
        ("next-nan", "other log-probabilities as part of a prompt"),
        ("above-1", "probabilities that sum to"),
        ("temperature", "divides logits by the temperature"),
    ],
)
@pytest.mark.parametrize(("kind", "scale_out"), [("vllm", False), ("vllm", True), ("sglang", False)])
def test_wrong_answers_are_refused(fake: FakeServer, fault: str, message: str, kind: str, scale_out: bool) -> None:
    fake.fault, fake.kind, fake.scale_out = fault, kind, scale_out
    with pytest.raises(TsdkdError, match=message):
        connect(fake)


@pytest.mark.parametrize(
    ("fault", "message"),
    [("shifted-candidates", "candidates belong to other tokens or positions"), ("nan-candidates", "no finite number")],
)
@pytest.mark.parametrize(("kind", "scale_out"), [("vllm", True), ("sglang", False)])
def test_wrong_log_probs_of_candidates_are_refused(
    fake: FakeServer, fault: str, message: str, kind: str, scale_out: bool
) -> None:
    fake.fault, fake.kind, fake.scale_out = fault, kind, scale_out
    with pytest.raises(TsdkdError, match=message):
        connect(fake)


@pytest.mark.parametrize(
    ("fault", "message"),
    [("other-ids", "read other token ids"), ("no-log-probs", "without the log-probabilities of the prompt")],
)
def test_proxies_that_change_requests_are_refused(fake: FakeServer, fault: str, message: str) -> None:
    fake.fault = fault
    with pytest.raises(TsdkdError, match=message):
        connect(fake)


@pytest.mark.parametrize("failure", ["500", "503", "429", "cut", "garbled", "slow"])
def test_failed_requests_are_repeated(fake: FakeServer, failure: str) -> None:
    with connect(fake) as server:
        expected = server.read(requests(2))
        fake.failures = [failure] * 2
        for first, second in zip(expected, server.read(requests(2)), strict=True):
            assert first.top_log_probs.equal(second.top_log_probs)
    assert not fake.failures


def test_refused_requests_are_not_repeated(fake: FakeServer) -> None:
    with connect(fake) as server:
        fake.failures, before = ["400"], len(fake.paths)
        with pytest.raises(TsdkdError, match=r"refuses a request \(400: Try again\)"):
            server.read(requests(1))
    assert len(fake.paths) == before + 1


def test_a_server_that_is_gone_ends_the_run() -> None:
    with serve(FakeServer(MODEL, TOKENIZER)) as fake:
        server = connect(fake)
    with pytest.raises(TsdkdError, match=r"failed 4 times .*run the same command: what is complete is kept") as error:
        server.read(requests())
    assert error.value.exit_code == 1
    with pytest.raises(InputError, match=r"No server responds at http://127\.0\.0\.1"):
        connect(fake)


def test_another_model_after_a_restart_is_refused(fake: FakeServer) -> None:
    with connect(fake) as server:
        recorded = server.fingerprint
        server.read(requests(1))
        fake.log_probs = random_model(VOCAB + 2, seed=1)
        with pytest.raises(TsdkdError, match="answers as another teacher than before"):
            server.read(requests(1))
    with connect(fake) as server, pytest.raises(TsdkdError, match="answers as another teacher"):
        server.continue_as(recorded)


def test_the_fingerprint_of_nan_is_refused(fake: FakeServer) -> None:
    with connect(fake) as server:
        fake.fault = "nan"
        with pytest.raises(TsdkdError, match="no finite number"):
            server.read([])


def test_rounding_does_not_change_the_teacher(fake: FakeServer) -> None:
    with connect(fake) as server:
        recorded = server.fingerprint
    noise = np.random.default_rng(0)

    def rounded(ids: list[int]) -> np.ndarray:
        values = MODEL(ids) + noise.normal(scale=0.02, size=(len(ids), VOCAB + 2))
        return np.asarray(values - np.log(np.exp(values).sum(-1, keepdims=True)))

    fake.log_probs = rounded
    with connect(fake) as server:
        assert server.fingerprint != recorded
        server.continue_as(recorded)
        assert server.fingerprint == recorded
        server.read(requests(1))


def test_requests_at_the_same_time_are_bounded(fake: FakeServer) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def counting(ids: list[int]) -> np.ndarray:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return MODEL(ids)

    with connect(fake, requests=2) as server:
        fake.log_probs = counting
        assert len(server.read(requests(8))) == 8
    assert most == 2


def test_an_interrupt_does_not_wait_for_answers(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "TIMEOUT", 600)
    answer = threading.Event()

    def stuck(ids: list[int]) -> np.ndarray:
        started.set()
        answer.wait()
        return MODEL(ids)

    def interrupt(_: int) -> None:
        started.wait()
        raise KeyboardInterrupt

    started = threading.Event()
    server = connect(fake)
    fake.log_probs = lambda ids: MODEL(ids) if len(ids) == 9 else stuck(ids)
    with pytest.raises(KeyboardInterrupt):
        server.read(requests(3), interrupt)
    assert not answer.is_set()
    answer.set()


def test_a_connection_that_is_made_during_the_closing_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Connection(f"http://127.0.0.1:{silent.getsockname()[1]}", 1)
        trace = client._trace

        def closing_first(event: str, info: dict[str, Any]) -> None:
            if event == "connection.connect_tcp.complete":
                client._closed.set()
            trace(event, info)

        monkeypatch.setattr(client, "_trace", closing_first)
        with pytest.raises(TsdkdError) as failure:
            client.post("/v1/completions", {})
    assert "timed out" not in str(failure.value)


def test_redirects_are_refused(fake: FakeServer) -> None:
    fake.fault = "redirect"
    with pytest.raises(InputError, match=r"redirects to elsewhere\.invalid\. Redirects are refused"):
        connect(fake)


def test_keys_come_from_the_environment_and_reach_no_message(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.key = KEY
    with pytest.raises(TsdkdError, match=f"refuses access .*Set {KEY_VARIABLE}"):
        connect(fake)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with connect(fake) as server:
        assert not server.sends_key_in_clear  # to this machine only
        fake.fault = "leak"
        with pytest.raises(TsdkdError, match=r"Bad header Bearer \*\*\*⟨1b⟩") as error:
            server.read(requests(1))
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost:8000", "ftp://host", "http://host:port", "http://[::1", "http://host/\x00"),
        *("https://user:secret@host", "https://host?key=secret", "https://host#secret"),
    ],
)
def test_urls_are_plain_addresses(url: str) -> None:
    with pytest.raises(InputError, match="--teacher-url") as error:
        connect(FakeServer(MODEL, url=url))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_keys_that_no_header_can_carry_are_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(InputError, match="no header can carry") as error:
        connect(FakeServer(MODEL, url="http://localhost:1"))
    assert key not in str(error.value)
