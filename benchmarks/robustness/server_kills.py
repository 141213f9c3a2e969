"""Kills the client or the teacher's server of `score --teacher-url` and `train --teacher-url`, and runs it again.

    python -m benchmarks.robustness.server_kills --trials 10 --seed 0

A trial sends SIGKILL at a random moment between the first and the last response that the server reads; of training,
between the first and the last step. Every third trial kills the client a second time. A killed server starts again at
once, and the client must continue; in every second trial it starts after the client has ended with a message. Then the
same command runs to its end. A fault is a row that is lost, doubled or out of order, and with the small server of the
tests any file that differs from those of a whole run; vLLM's rounding differs from call to call. vLLM takes part where
it is installed, in a fifth of the trials.
"""

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.torch import load_file, save_file

from benchmarks.robustness.rows import Row, campaign_parser, write_rows_and_exit
from benchmarks.robustness.server_processes import HASTY, PATIENT, VOCAB, Client, FakeTeacher, Server
from benchmarks.robustness.trees import differences, tree_of
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tests.helpers.vllm_server import VllmServer
from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.reader import read_artifact
from tsdkd.core import TSDKDConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import OnlineConfig, TrainConfig
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.observer import Observer
from tsdkd.stages.score.served import score_served
from tsdkd.stages.train.stage import train_served

PROMPTS, TOP_K = 24, 64
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
LARGEST_DIFFERENCE = 1e-3
"""Nats between two scores of one token that vLLM's rounding explains."""
Work = Callable[[str, Path, Observer], object]
"""A stage with the address of the server, its output and an observer."""


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
