"""Kills every stage at system calls that change its files, runs it again, and compares all files with a whole run.

    python -m benchmarks.robustness.kills --trials 500 --seed 0 --out kills --workers 2

A trial copies a directory with prompts and a complete run of tiny models, runs one command in it and kills it by
SIGKILL just before a call of `system_calls.CALLS`, or after half of a write; every third trial kills the second run as
well. Then the command runs to its end, and every file and directory must be as after a run that nothing interrupted.
Where an older artifact is replaced or extended, the older or the newer one must be whole between the runs. The content
of journals and of `.times.jsonl` may differ, because they hold times; in config.yaml, the trial's directory counts as
the same path. Calls outside the directory are not counted, such as those in the caches of datasets; temporary files
that a killed process leaves in TMPDIR are counted and are no fault.

Each trial is a file of OUT/trials. The same command continues a campaign that was interrupted.
"""

import gc
import json
import os
import random
import re
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain, zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.robustness.kill_cases import CASES, RUN, Case
from benchmarks.robustness.preload import preload
from benchmarks.robustness.rows import Row, campaign_parser, write_rows_and_exit
from benchmarks.robustness.system_calls import SUPPORTED, Call, Kill, Outcome, run_traced
from benchmarks.robustness.trees import differences, output_state, tree_of

INTERRUPTED = 130
LONGEST_RUN = 300
"""Seconds after which a run is ended and counts as a fault."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A case and where its runs are killed; the run after the last kill ends."""

    name: str
    case: Case
    kills: tuple[Kill, ...]


@dataclass(frozen=True, slots=True)
class Expected:
    """What a run that nothing interrupts does in a case."""

    older: dict[str, str]
    newer: dict[str, str]
    """Files and directories before and after the run (`tree_of`)."""
    calls: tuple[Call, ...]


class Campaign:
    """The directories of a campaign, and its trials."""

    def __init__(self, out: Path, cases: list[Case]) -> None:
        self.out, self.cases = out.resolve(), cases

    def prepare(self) -> None:
        """Make the run that all trials start from."""
        from tests.helpers.benchmark_rows import write_rows
        from tests.helpers.models import save_tiny_model
        from tests.helpers.prompts import write_prompts

        base = self.out / "base"
        if not base.exists():
            building, models = self._emptied("base.new"), self._emptied("models")
            save_tiny_model(models / "teacher", seed=1, layers=3, width=48, padding_rows=14)
            save_tiny_model(models / "student", seed=2)
            write_prompts(building / "prompts.jsonl", 8)
            write_rows(building / "data")
            for command in RUN:
                self._complete(command, building)
            building.rename(base)
        (self.out / "trials").mkdir(exist_ok=True)

    def _directory_of(self, case: Case) -> Path:
        return self.out / "cases" / _file_name(case.name)

    def _complete(self, command: str, directory: Path) -> Outcome:
        outcome = self.run(command, directory)
        if outcome.status:
            raise SystemExit(f"{command}\n{self._last_lines()}")
        return outcome

    def expected(self, case: Case) -> Expected:
        """What a whole run does; measured at the first call, and read afterwards."""
        directory = self._directory_of(case)
        record = directory / "expected.json"
        if not record.exists():
            start = self._emptied(str((directory / "start").relative_to(self.out)))
            shutil.copytree(self.out / "base", start, dirs_exist_ok=True)
            if case.older:
                self._complete(case.older, start)
            older, work = tree_of(start), self.start(case)
            calls = self._complete(case.command, work).calls
            content = {"older": older, "newer": tree_of(work), "calls": [asdict(call) for call in calls]}
            _write_json(record, content)
        return _read_expected(record)

    def trials(self, count: int, seed: int) -> Iterator[Trial]:
        """The trials of a seed: cases in turn, and in each case every kind of call before the same kind again."""
        orders = {case: _spread(self.expected(case).calls, f"{seed} {case.name}") for case in self.cases}
        for number in range(count):
            case, turn = self.cases[number % len(self.cases)], number // len(self.cases)
            calls, order = self.expected(case).calls, orders[case]
            generator = random.Random(f"{seed} {turn} {case.name}")
            first = order[turn % len(order)]
            kills = [Kill(first, halved=calls[first - 1].name == "write" and generator.random() < 0.5)]
            if number % 3 == 0:
                kills.append(Kill(generator.randint(1, len(calls))))
            yield Trial(f"{_file_name(case.name)}-{seed}-{turn}", case, tuple(kills))

    def run_trial(self, trial: Trial) -> dict[str, Any]:
        """Run, kill, run again and compare; the record of a trial, which is read if it was written before."""
        file = self.out / "trials" / f"{trial.name}.json"
        if not file.exists():
            _write_json(file, self._run_trial(trial))
        content: dict[str, Any] = json.loads(file.read_text())
        return content

    def _run_trial(self, trial: Trial) -> dict[str, Any]:
        case, expected = trial.case, self.expected(trial.case)
        work, temporary = self.start(case), self._emptied(f"tmp-{os.getpid()}")
        killed, between = [], []
        for kill in trial.kills:
            outcome = self.run(case.command, work, kill)
            if outcome.status not in {-signal.SIGKILL, INTERRUPTED}:
                break  # a second run makes fewer calls
            killed.append(asdict(outcome.calls[kill.call - 1]) | asdict(kill))
            between.append(output_state(work, case.output, expected.older, expected.newer))
        good = {"older", "newer"} if case.older else {"none", "partial", "newer"}
        faults = [f"between the runs: {state}" for state in between if state not in good]
        outcome = self.run(case.command, work)
        if outcome.status:
            faults.append(f"exit {outcome.status}: {self._last_lines()}")
        faults += self.faults(case, work)
        if faults:
            shutil.copytree(work, self._emptied(f"faults/{trial.name}"), dirs_exist_ok=True, symlinks=True)
        return {
            "trial": trial.name,
            "case": case.name,
            "command": case.command,
            "kills": killed,
            "between": between,
            "left_in_tmpdir": sorted(path.name for path in temporary.iterdir()),
            "faults": faults,
        }

    @property
    def work(self) -> Path:
        """The working directory of this process."""
        return self.out / f"work-{os.getpid()}"

    def start(self, case: Case) -> Path:
        """The working directory, as before a case."""
        self._emptied(self.work.name)
        shutil.copytree(self._directory_of(case) / "start", self.work, dirs_exist_ok=True)
        return self.work

    def faults(self, case: Case, work: Path) -> list[str]:
        """What a directory holds otherwise than after a run that nothing interrupts."""
        return differences(self.expected(case).newer, tree_of(work))

    def run(self, command: str, directory: Path, kill: Kill | None = None) -> Outcome:
        """Run a command in a directory, to its end or until it is killed."""
        output, temporary = self._output_file(), self.out / f"tmp-{os.getpid()}"
        output.unlink(missing_ok=True)
        temporary.mkdir(exist_ok=True)

        def work() -> None:
            signal.alarm(LONGEST_RUN)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
            os.environ["TMPDIR"], tempfile.tempdir = str(temporary), None
            from tsdkd.cli import app

            app(command.format(models=self.out / "models").split(), prog_name="tsdkd")

        return run_traced(work, directory, output, kill)

    def _output_file(self) -> Path:
        return self.out / f"output-{os.getpid()}.txt"

    def _last_lines(self) -> str:
        return " ".join(self._output_file().read_text(errors="replace").split())[-600:]

    def _emptied(self, name: str) -> Path:
        path = self.out / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


def _write_json(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(file)


def _file_name(name: str) -> str:
    return re.sub(r"\W+", "-", name)


@cache
def _read_expected(record: Path) -> Expected:
    content = json.loads(record.read_text())
    return Expected(content["older"], content["newer"], tuple(Call(**call) for call in content["calls"]))


def _spread(calls: tuple[Call, ...], seed: str) -> list[int]:
    """The numbers of all calls in random order, such that calls on one file take turns with calls on others."""
    groups: dict[str, list[int]] = {}
    for number, call in enumerate(calls, 1):
        groups.setdefault(f"{call.name} {re.sub(r'[.]tmp[A-Za-z0-9]+|[0-9]+', '', call.path)}", []).append(number)
    generator = random.Random(seed)
    shuffled = [generator.sample(group, len(group)) for group in groups.values()]
    generator.shuffle(shuffled)
    return [number for number in chain.from_iterable(zip_longest(*shuffled)) if number]


def rows_of(records: list[dict[str, Any]]) -> list[Row]:
    """A row per case."""
    rows = []
    for name in dict.fromkeys(record["case"] for record in records):
        of_case = [record for record in records if record["case"] == name]
        states = Counter(state for record in of_case for state in record["between"])
        counts = {
            "kills": sum(len(record["kills"]) for record in of_case),
            **{state: states[state] for state in ("none", "partial", "older", "newer")},
            "left in TMPDIR": sum(bool(record["left_in_tmpdir"]) for record in of_case),
        }
        rows.append(Row(name, len(of_case), sum(bool(record["faults"]) for record in of_case), counts))
    return rows


def _set_environment(out: Path) -> None:
    """Settings that libraries read when they are imported."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"HF_HOME": str(out.resolve() / "cache"), "COLUMNS": "200"}


def main() -> None:
    parser = campaign_parser(__doc__, trials=500)
    parser.add_argument("--out", type=Path, help="directory of the campaign; default: a temporary one")
    parser.add_argument("--workers", type=int, default=1, help="processes that run trials")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES, metavar="CASE", help="; ".join(CASES))
    options = parser.parse_args()
    if not SUPPORTED:
        parser.error("system calls are traced on Linux on x86-64 only")
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        _set_environment(out)
        preload()
        gc.freeze()  # runs share the memory of what is loaded
        campaign = Campaign(out, [CASES[name] for name in options.cases])
        campaign.prepare()
        with ProcessPoolExecutor(options.workers, mp_context=get_context("fork")) as pool:
            list(pool.map(campaign.expected, campaign.cases))
            records = list(pool.map(campaign.run_trial, campaign.trials(options.trials, options.seed)))
    for record in records:
        for fault in record["faults"]:
            print(f"{record['trial']}: {fault}")
    write_rows_and_exit("Kills at system calls", rows_of(records), options.json)


if __name__ == "__main__":
    main()
