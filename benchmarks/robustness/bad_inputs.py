"""Counts what commands do with bad inputs: refuse them with a cause and a remedy, run, or end in a raw error.

    python -m benchmarks.robustness.bad_inputs --trials 1000 --seed 0

Each trial spoils one input of one command: an option, a prompts file, a file of a model or an adapter, a name, a plan,
a file of options, a journal or a log. It runs in a forked process with a time limit. Prints a table of counts by
command, and every raw error with the number of its trial; `--only N` repeats one.
"""

import json
import os
import random
import re
import select
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import huggingface_hub
from typer.testing import CliRunner

from benchmarks.robustness.rows import Row, campaign_parser, write_rows_and_exit
from benchmarks.robustness.spoiled_commands import COMMANDS, Spoiler, make_inputs
from tsdkd.cli import app
from tsdkd.stages.engines import choice

SECONDS = 120
"""Time limit of one trial; a slower one counts as a raw error."""
RAW = re.compile(r"^\w*(Error|Exception|Interrupt|Exit|Warning)\b:|Traceback|run `?tsdkd --debug", re.IGNORECASE)
"""A cause that names a Python error."""


def run_trial(inputs: Path, seed: int, trial: int) -> tuple[str, str, str]:
    """The command, its outcome ("refused", "ran" or "raw") and what it printed."""
    with TemporaryDirectory() as directory:
        copy = Path(directory) / "above" / "d"
        shutil.copytree(inputs, copy)
        # The run names the inputs' models by their paths, which the copy does not change.
        name, words = Spoiler(random.Random(seed * 1_000_003 + trial), copy).spoiled_command()
        code, output = _in_child(words, copy)
    return name, outcome_of(code, output), f"{words} -> {code}\n{output[-1500:]}"


def outcome_of(code: int | None, output: str) -> str:
    if code == 0:
        return "ran"
    lines = [line for line in output.splitlines() if line.startswith(("error:", "try:"))]
    has_cause_and_remedy = [line.split(":")[0] for line in lines] == ["error", "try"]
    return "refused" if code in {1, 2} and has_cause_and_remedy and not any(map(RAW.search, _texts(lines))) else "raw"


def _texts(lines: list[str]) -> Iterator[str]:
    return (line.partition(":")[2].strip() for line in lines)


def _in_child(words: list[str], directory: Path) -> tuple[int | None, str]:
    """The exit code (None: after the time limit or a signal) and the output of a command in a forked process.

    It runs in `directory`, because a word may become a relative output path.
    """
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.close(reader)
        try:
            result = _invoke(words, directory)
        except BaseException:  # an exit or an interrupt too: the child must not continue the campaign
            result = 99, traceback.format_exc()
        with os.fdopen(writer, "w") as file:
            file.write(json.dumps(result))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        ready, _, _ = select.select([file], [], [], SECONDS)
        content = file.read() if ready else ""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    code, output = json.loads(content) if content else (None, "no result")
    return code, output


def _invoke(words: list[str], directory: Path) -> tuple[int, str]:
    os.chdir(directory)
    choice.has_vllm = lambda: False  # it takes half a minute to load
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    result = CliRunner().invoke(app, words, input="y\n" * 9)
    crash = "" if isinstance(result.exception, SystemExit | None) else f"Traceback {result.exception!r}"
    return result.exit_code, result.stderr + crash


def main() -> None:
    parser = campaign_parser(__doc__, trials=1000)
    parser.add_argument("--only", type=int, help="number of the one trial to repeat")
    options = parser.parse_args()
    counts: dict[str, Counter[str]] = {name: Counter() for name in COMMANDS}
    with TemporaryDirectory() as directory:
        inputs = Path(directory)
        make_inputs(inputs)
        for trial in range(options.trials) if options.only is None else [options.only]:
            name, outcome, report = run_trial(inputs, options.seed, trial)
            counts[name][outcome] += 1
            if outcome == "raw" or options.only is not None:
                print(f"trial {trial}: {report}\n", file=sys.stderr, flush=True)
    rows = [
        Row(name, found.total(), found["raw"], {name: found[name] for name in ("refused", "ran", "raw")})
        for name, found in counts.items()
    ]
    write_rows_and_exit("Bad inputs", rows, options.json)


if __name__ == "__main__":
    main()
