"""Kills the client or the teacher's server of `score --teacher-url` and `train --teacher-url`, and runs it again.

    python -m benchmarks.robustness.server_kills --trials 10 --seed 0

A trial sends SIGKILL at a random moment between the first and the last response that the server reads; of training,
between the first and the last step. Every third trial kills the client a second time. A killed server starts again at
once, and the client must continue; in every second trial it starts after the client has ended with a message. Then the
same command runs to its end. A fault is a row that is lost, doubled or out of order, and with the small server of the
tests any file that differs from those of a whole run; vLLM's rounding differs from call to call. vLLM takes part where
it is installed, in a fifth of the trials.
"""

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import httpx2
import numpy as np
from safetensors.torch import load_file, save_file

from benchmarks.robustness.kills import PRELOADED
from benchmarks.robustness.rows import Row, campaign_parser, write_rows_and_exit
from benchmarks.robustness.trees import differences, tree_of
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tests.helpers.teacher_server import FakeServer, random_model, serve
from tests.helpers.vllm_server import VllmServer, free_port
from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.reader import read_artifact
from tsdkd.core import TSDKDConfig
from tsdkd.errors import TsdkdError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import OnlineConfig, TrainConfig
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.observer import Observer, SilentObserver
from tsdkd.stages.score.served import score_served
from tsdkd.stages.teacher_server import connection
from tsdkd.stages.train.stage import train_served

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([*PRELOADED, "tsdkd.stages.score.served"])
PROMPTS, VOCAB, TOP_K = 24, 258, 64
SECONDS_PER_REQUEST = 0.01
SAMPLING = GenerateConfig(engine="transformers", max_new_tokens=12, part_size=4)
SCORING = ScoreConfig(signal="topk", k=4, top_k=TOP_K)
TRAINING = TrainConfig(
    objective=TSDKDConfig(k=4),
    online=OnlineConfig(sampling=SAMPLING, teacher_top_k=TOP_K),
    epochs=1,
    batch_size=4,
    precision="float32",
    save_steps=1,
)
PATIENT, HASTY = 10, 3
"""Attempts of a request where the server comes back, and where it does not."""
LARGEST_DIFFERENCE = 1e-3
"""Nats between two scores of one token that vLLM's rounding explains."""
Work = Callable[[str, Path, Observer], object]
"""A stage with the address of the server, its output and an observer."""


class Server(Protocol):
    url: str

    def start(self) -> None: ...

    def end(self, signal_: signal.Signals) -> None: ...


class FakeTeacher:
    """The small server of the tests in a process of its own, always at one address."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._process = PROCESSES.Process(target=_serve_forever, args=(self.port,))
        self._process.start()
        while not _responds(self.url):
            time.sleep(0.01)

    def end(self, signal_: signal.Signals) -> None:
        assert self._process.pid
        os.kill(self._process.pid, signal_)
        self._process.join()


def _serve_forever(port: int) -> None:
    model = random_model(VOCAB)

    def slow(ids: list[int]) -> np.ndarray:
        time.sleep(SECONDS_PER_REQUEST)
        return model(ids)

    with serve(FakeServer(slow, max_logprobs=VOCAB), port):
        time.sleep(10**6)


def _responds(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/v1/models").is_success
    except httpx2.TransportError:
        return False


class Client:
    """A stage in a process of its own, which reports its progress."""

    def __init__(self, work: Callable[[Observer], object], log: Path, attempts: int = PATIENT) -> None:
        self.log = log
        self._progress, sender = PROCESSES.Pipe(duplex=False)
        self._process = PROCESSES.Process(target=_run, args=(work, sender, log, attempts))
        self._process.start()
        sender.close()

    def wait_for(self, units: int) -> None:
        """Return after this many responses or steps, or at the end of the process."""
        while units > 0:
            try:
                units -= self._progress.recv()
            except EOFError:
                return

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> int:
        """The exit code, once the process has ended."""
        self.wait_for(10**6)
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


class ProgressObserver(SilentObserver):
    """Sends each advance of a progress bar, and prints messages."""

    def __init__(self, sender: Connection) -> None:
        self.sender = sender

    def info(self, message: str) -> None:
        print(message, flush=True)

    @contextmanager
    def progress(self, *_: Any) -> Iterator[Callable[[int], None]]:
        yield self.sender.send


def _run(work: Callable[[Observer], object], sender: Connection, log: Path, attempts: int) -> None:
    connection.ATTEMPTS = attempts
    with log.open("w") as file, redirect_stdout(file):
        try:
            work(ProgressObserver(sender))
        except TsdkdError as error:
            print(f"error: {error.cause} {error.remedy}")
            raise SystemExit(error.exit_code) from None


@dataclass(frozen=True)
class Case:
    """A stage that reads a server; `units`: the responses or steps of a whole run."""

    name: str
    work: Work
    server: Server
    units: int
    exact: bool = True
    """Whether the server's answers are the same each time, so that all files must be."""


class Campaign:
    """The trials of a seed, one after another."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory, self.log, self.random = directory, directory / "client.log", random.Random(seed)
        self.output = directory / "out"

    def run(self, case: Case, victim: str, trials: int) -> Row:
        """The row of a case whose client or server is killed."""
        whole, counts, faulty = self.directory / f"{case.name}-{victim}", Counter[str](), 0
        start = time.perf_counter()
        if self._client(case, whole).end():
            raise SystemExit(self.log.read_text())
        mean_seconds = (time.perf_counter() - start) / case.units
        for number in range(trials):
            shutil.rmtree(self.output, ignore_errors=True)
            if victim == "client":
                faults = []
                self._kill_client(case, mean_seconds, counts, kills=1 + (number % 3 == 2))
            else:
                faults = self._kill_server(case, mean_seconds, counts, returns=number % 2 == 0)
            if code := self._client(case, self.output).end():
                faults.append(f"exit {code}: {self.log.read_text()[-300:]}")
            else:
                faults += self._differences(case, whole)
            faulty += bool(faults)
            print(f"{case.name}, {victim}, trial {number}: {faults or 'as a whole run'}", flush=True)
        return Row(f"{case.name}: {victim} killed", trials, faulty, dict(counts))

    def _client(self, case: Case, output: Path, attempts: int = PATIENT) -> Client:
        return Client(partial(case.work, case.server.url, output), self.log, attempts)

    def _wait(self, case: Case, client: Client, mean_seconds: float) -> None:
        client.wait_for(self.random.randrange(1, case.units))
        time.sleep(self.random.uniform(0, mean_seconds))

    def _kill_client(self, case: Case, mean_seconds: float, counts: Counter[str], kills: int) -> None:
        for _ in range(kills):
            client = self._client(case, self.output)
            self._wait(case, client, mean_seconds)
            client.kill()
            counts["kills"] += client.end() == -signal.SIGKILL
            counts["resumed"] += self._is_partial()

    def _kill_server(self, case: Case, mean_seconds: float, counts: Counter[str], *, returns: bool) -> list[str]:
        client = self._client(case, self.output, PATIENT if returns else HASTY)
        self._wait(case, client, mean_seconds)
        case.server.end(signal.SIGKILL)
        if returns:
            case.server.start()
        code = client.end()
        if not returns:
            case.server.start()
        ends_well = code == 1 and "what is complete is kept" in self.log.read_text()
        counts.update(
            {"kills": 1, "client went on": code == 0, "client ended": ends_well, "resumed": self._is_partial()}
        )
        if code == 0 or (ends_well and not returns):
            return []
        return [f"the client ends with {code}: {self.log.read_text()[-300:]}"]

    def _is_partial(self) -> bool:
        """Whether the output holds complete parts or saved steps, and more are missing."""
        manifest = self.output / MANIFEST_FILE
        found = [*self.output.glob("*.parquet"), *self.output.rglob("checkpoint-*")]
        return manifest.is_file() and load_manifest(self.output).state == "partial" and bool(found)

    def _differences(self, case: Case, whole: Path) -> list[str]:
        """What the output holds otherwise than a whole one."""
        if case.exact:
            return differences(tree_of(whole), tree_of(self.output))
        expected, found = (read_artifact(path, "scores").table() for path in (whole, self.output))
        if expected["sample_id"] != found["sample_id"]:
            return ["rows are lost, doubled or out of order"]
        values = [table["teacher_log_prob"].combine_chunks().flatten().to_numpy() for table in (expected, found)]
        apart = np.abs(values[0] - values[1]).max()
        return [f"log-probabilities differ by {apart:.2g} nats"] if apart > LARGEST_DIFFERENCE else []


def _score(rollouts: Path, student: str, url: str, output: Path, observer: Observer) -> None:
    score_served(rollouts, student, url, None, output, SCORING, observer)


def _train(prompts: Path, student: str, url: str, output: Path, observer: Observer) -> None:
    train_served(prompts, student, url, None, output, TRAINING, 0, observer)


def _save_sharp_model(path: Path) -> str:
    """A tiny model whose top K hold most of the probability."""
    file = save_tiny_model(path, seed=5, head_dim=32, padding_rows=0) / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] *= 5
    save_file(weights, file, {"format": "pt"})
    return str(path)


@contextmanager
def _running(server: Server) -> Iterator[None]:
    server.start()
    try:
        yield
    finally:
        server.end(signal.SIGTERM)


def main() -> None:
    options = campaign_parser(__doc__, trials=10).parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    rows = []
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        student = str(save_tiny_model(directory / "student", seed=2))
        teacher = _save_sharp_model(directory / "teacher")
        prompts = write_prompts(directory / "prompts.jsonl", PROMPTS)
        rollouts, log = directory / "rollouts", directory / "generate.log"
        assert Client(partial(generate, prompts, student, rollouts, SAMPLING, 0), log).end() == 0, log.read_text()
        score, train = partial(_score, rollouts, student), partial(_train, prompts, student)
        steps = PROMPTS // TRAINING.batch_size
        campaign, fake = Campaign(directory, options.seed), FakeTeacher()
        cases = [Case("score", score, fake, PROMPTS), Case("train online", train, fake, steps)]
        if find_spec("vllm"):
            vllm = VllmServer(teacher, directory / "vllm.log", "--max-logprobs", str(VOCAB))
            cases.append(Case("score, vLLM", score, vllm, PROMPTS, exact=False))
        for case in cases:
            trials = options.trials if case.exact else -(-options.trials // 5)
            with _running(case.server):
                rows += [campaign.run(case, victim, trials) for victim in ("client", "server")]
    write_rows_and_exit("Kills with a served teacher", rows, options.json)


if __name__ == "__main__":
    main()
