"""Shows the message of `tsdkd score --teacher-url` for each fault of a server; a raw error is a fault of tsdkd.

    python -m benchmarks.robustness.server_faults
    python -m benchmarks.robustness.server_faults --page docs/served_teacher.md

The server is the small one of the tests. A fault begins before the run, or once the first part of the scores is
complete. Waiting times are shortened. --page replaces the table of the messages in a page. Each fault is one trial;
--trials and --seed change nothing.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
from typer.testing import CliRunner

from benchmarks.robustness.bad_inputs import outcome_of
from benchmarks.robustness.rows import Row, campaign_parser, write_rows_and_exit
from tests.helpers.models import byte_tokenizer, save_tiny_model
from tests.helpers.prompts import write_prompts
from tests.helpers.teacher_server import FakeServer, random_model, serve
from tsdkd.cli import app
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.teacher_server import connection

VOCAB = 258
HEADER = "| the server | message | remedy |\n|---|---|---|\n"
ADDRESS = "http://localhost:8000"
PARTS, RESPONSES = 2, 4
"""Parts of the rollouts, and the responses of each."""


@dataclass(frozen=True)
class Fault:
    """`begin` changes the server; `later`: once the first part of the scores is complete."""

    name: str
    begin: Callable[[FakeServer], None]
    later: bool = False
    time_limit: float = 60
    """Seconds that the command waits for an answer."""


def _set(**fields: object) -> Callable[[FakeServer], None]:
    def begin(fake: FakeServer) -> None:
        for name, value in fields.items():
            setattr(fake, name, value)

    return begin


def _fail(failure: str) -> Callable[[FakeServer], None]:
    return lambda fake: fake.failures.extend([failure] * 1000)


def _other_tokenizer(fake: FakeServer) -> None:
    fake.tokenizer = byte_tokenizer()
    fake.tokenizer.add_tokens(["river"])


FAULTS = (
    Fault("does not run", _set(url="http://127.0.0.1:9")),
    Fault("answers too late", _fail("slow"), later=True, time_limit=0.3),
    Fault("answers with status 500", _fail("500"), later=True),
    Fault("cuts connections", _fail("cut"), later=True),
    Fault("wants another key", _set(key="another")),
    Fault("redirects to another host", _set(fault="redirect")),
    Fault("has another tokenizer", _other_tokenizer),
    Fault("has a short context", _set(max_model_len=30)),
    Fault("gives fewer log-probabilities than `--top-k`", _set(max_logprobs=20)),
    Fault("gives fewer log-probabilities than it is asked for", _set(fault="fewer")),
    Fault("gives none", _set(fault="no-log-probs")),
    Fault("shifts log-probabilities by one position", _set(fault="shift")),
    Fault("reads other ids than it receives", _set(fault="other-ids")),
    Fault("gives NaN", _set(fault="nan"), later=True),
    Fault("gives probabilities above 1", _set(fault="above-1")),
    Fault("divides logits by the temperature", _set(fault="temperature")),
    Fault("shifts log-probabilities later", _set(fault="shift"), later=True),
    Fault("answers as another teacher after a restart", _set(log_probs=random_model(VOCAB, seed=1)), later=True),
    Fault("serves another model after a restart", _set(model="served/other"), later=True),
)
"""What the server does."""


@dataclass(frozen=True)
class FaultResult:
    """The message of the command, and the number of parts that it keeps."""

    outcome: str
    """As `outcome_of` returns it."""
    cause: str
    remedy: str
    parts: int


def run_faults(directory: Path, faults: Sequence[Fault] = FAULTS) -> dict[str, FaultResult]:
    """The message of the command, and the parts that it keeps, by fault."""
    student = save_tiny_model(directory / "student", seed=2)
    prompts = write_prompts(directory / "prompts.jsonl", PARTS * RESPONSES)
    rollouts = directory / "rollouts"
    generate(
        prompts, str(student), rollouts, GenerateConfig(engine="transformers", max_new_tokens=8, part_size=RESPONSES)
    )
    command = ["score", "--rollouts", str(rollouts), "--student", str(student), "--signal", "topk"]
    command += ["--scores"]
    return {fault.name: _run(fault, command, directory / f"scores-{i}") for i, fault in enumerate(faults)}


def _run(fault: Fault, command: list[str], output: Path) -> FaultResult:
    times = {"FIRST_PAUSE": 0.001, "LONGEST_PAUSE": 0.001, "TIMEOUT": fault.time_limit}
    with patch.multiple(connection, **times), _faulty_server(fault, output) as fake:
        words = [*command, str(output), "--teacher-url", fake.url]
        result = CliRunner(env={"COLUMNS": "1000"}).invoke(app, words)
    lines = dict(re.findall("^(error|try): *(.*)$", result.stderr.replace(fake.url, ADDRESS), re.MULTILINE))
    outcome = outcome_of(result.exit_code, result.stderr)
    return FaultResult(outcome, lines.get("error", ""), lines.get("try", ""), len(list(output.glob("*.parquet"))))


@contextmanager
def _faulty_server(fault: Fault, output: Path) -> Iterator[FakeServer]:
    model = random_model(VOCAB)

    def fails_later(ids: list[int]) -> np.ndarray:
        if not any(output.glob("*.parquet")):
            return model(ids)
        fake.log_probs = model
        fault.begin(fake)
        return fake.log_probs(ids)

    with serve(FakeServer(model, byte_tokenizer(), max_logprobs=100)) as fake:
        if fault.later:
            fake.log_probs = fails_later
        else:
            fault.begin(fake)
        yield fake


def table_of(results: dict[str, FaultResult]) -> str:
    """A Markdown table."""
    return HEADER + "".join(f"| {name} | {result.cause} | {result.remedy} |\n" for name, result in results.items())


def replace_table(page: Path, table: str) -> None:
    before, rest = page.read_text().split(HEADER)
    after = rest.lstrip("\n") if rest.startswith("\n") else rest.partition("\n\n")[2]
    page.write_text(f"{before}{table}\n{after}".rstrip("\n") + "\n")


def main() -> None:
    parser = campaign_parser(__doc__, trials=len(FAULTS))
    parser.add_argument("--page", type=Path, help="page whose table is replaced")
    options = parser.parse_args()
    with TemporaryDirectory() as directory:
        results = run_faults(Path(directory))
    for name, result in results.items():
        print(f"{name}: {result}")
    if options.page:
        replace_table(options.page, table_of(results))
    expected = {fault.name: int(fault.later) for fault in FAULTS}
    rows = [
        Row(name, 1, int(result.outcome != "refused" or result.parts != expected[name]), {"parts kept": result.parts})
        for name, result in results.items()
    ]
    write_rows_and_exit("Faults of a teacher's server", rows, options.json)


if __name__ == "__main__":
    main()
