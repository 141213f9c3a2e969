"""Counts the programs that pass without solving their task.

    python -m benchmarks.robustness.verdicts --seed 0

The sandbox tests right programs, forgeries, and programs that hold the answers of the tests, each once and at most
--trials of a kind. A program with the answers in its own text passes like a right one, because a prompt shows its
tests. Forgeries and programs that read the answers from a file must fail. A fault is a program with the wrong verdict.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.robustness.rows import Row, campaign_parser, write_rows_and_exit
from benchmarks.robustness.verdict_programs import FORGERIES, READER, TASKS, Task
from tsdkd.stages.eval.sandbox.verdict import judge_program

TESTS = 3


def main() -> None:
    options = campaign_parser(__doc__, trials=100).parse_args()
    rows = []
    with TemporaryDirectory() as directory:
        for kind, expected, programs in _kinds(options.seed, Path(directory)):
            chosen = programs[: options.trials]
            verdicts = [judge_program(program, tests, "", task.solution) for task, program, tests in chosen]
            passed = sum(verdict.passed for verdict in verdicts)
            faults = len(verdicts) - passed if expected else passed
            rows.append(Row(kind, len(verdicts), faults, {"passed": passed}))
    write_rows_and_exit("Verdicts", rows, options.json)


def _kinds(seed: int, directory: Path) -> Iterator[tuple[str, bool, list[tuple[Task, str, list[str]]]]]:
    """The name of a kind, whether its programs pass, and its programs with their tasks and tests."""
    tasks = [(task, *_tests(task, seed)) for task in TASKS]
    yield "right", True, [(task, task.solution, tests) for task, tests, _ in tasks]
    yield "forgeries", False, list(forgeries(seed))
    yield "answers by argument", True, [(task, _by_argument(task, calls), tests) for task, tests, calls in tasks]
    yield "answers by order", True, [(task, _by_order(task, calls), tests) for task, tests, calls in tasks]
    yield "answers in the text of the tests", True, [(task, _by_text(task, tests), tests) for task, tests, _ in tasks]
    by_file = [(task, _by_file(task, calls, directory / task.name), tests) for task, tests, calls in tasks]
    yield "answers in a file of the user", False, by_file


def forgeries(seed: int) -> Iterator[tuple[Task, str, list[str]]]:
    """Each forgery, for a task that the seed chooses."""
    generator = random.Random(seed)
    for program in FORGERIES.values():
        task = generator.choice(TASKS)
        yield task, program.replace("NAME", task.name), _tests(task, seed)[0]


def _tests(task: Task, seed: int) -> tuple[list[str], dict[str, object]]:
    """Tests of a task, and their answers by argument."""
    names: dict[str, object] = {"random": random.Random(f"{seed} {task.name}")}
    exec(task.solution, names)
    calls = {}
    while len(calls) < TESTS:
        argument = eval(task.arguments, names)
        calls[repr(argument)] = eval(f"{task.name}({argument!r})", names)
    tests = [
        task.test.format(call=f"{task.name}({argument})", answer=_literal(answer)) for argument, answer in calls.items()
    ]
    return tests, calls


def _literal(answer: object) -> str:
    return repr(dict(answer) if isinstance(answer, dict) else answer)


def _by_argument(task: Task, calls: dict[str, object]) -> str:
    table = ", ".join(f"{argument!r}: {_literal(answer)}" for argument, answer in calls.items())
    return f"import math\ndef {task.name}(x): return {{{table}}}[repr(x)]"


def _by_order(task: Task, calls: dict[str, object]) -> str:
    answers = ", ".join(_literal(answer) for answer in calls.values())
    return f"import math\nanswers = iter([{answers}])\ndef {task.name}(_): return next(answers)"


def _by_text(task: Task, tests: list[str]) -> str:
    return f"TESTS = {tests!r}\n{READER.replace('NAME', task.name)}"


def _by_file(task: Task, calls: dict[str, object], file: Path) -> str:
    file.write_text(repr({argument: _literal(answer) for argument, answer in calls.items()}))
    return f"import math\ndef {task.name}(x): return eval(eval(open({str(file)!r}).read())[repr(x)])"


if __name__ == "__main__":
    main()
