"""The verdict on a program: whether it passes tests, and if not, why."""

import ast
import builtins
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tsdkd.stages.eval.sandbox import confinement
from tsdkd.stages.eval.sandbox.codec import CodecError, Decoder, Encoder
from tsdkd.stages.eval.sandbox.judge import REASON_LENGTH

WALL_SECONDS, CPU_SECONDS = 10.0, 5
SPARE_SECONDS = 10.0
"""Additional time for the start and the end of the processes."""
SUPERVISOR = Path(__file__).with_name("supervisor.py")


@dataclass(frozen=True, slots=True)
class Verdict:
    passed: bool
    reason: str = ""
    """Why the program did not pass."""
    limit: str = ""
    """The limit of the sandbox that the program hit, a word of `judge.LIMITS`; empty if it failed by itself."""
    judged_by_objects: bool = False
    """The tests used objects of the program, and not only values."""


def judge_program(
    program: str, tests: Sequence[str], setup: str = "", reference: str = "", imports: Sequence[str] = ()
) -> Verdict:
    """Run a Python program and tests of its functions, in two confined processes.

    `setup` and `imports` run before the tests; their import statements run in the program too. `reference` is a
    right program: the tests use its imports where the program has the same names, and a name that it defines counts as
    the program's, not as a built-in one.
    """
    if not tests:
        return Verdict(False, "there are no tests")
    try:
        inputs = _encode_inputs(program, tests, setup, reference, imports)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Verdict(False, f"the tests are no Python ({type(error).__name__})")
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", str(SUPERVISOR), str(os.getpid()), str(WALL_SECONDS), str(CPU_SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={"HOME": "/", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(inputs, timeout=WALL_SECONDS + SPARE_SECONDS)
        outcome = Decoder(_no_object).decode(output)
    except subprocess.TimeoutExpired:
        outcome = {"timed_out": True}
    except CodecError:
        outcome = {"not_confined": f"the sandbox ended (status {process.wait()})"}
    finally:
        process.kill()
        process.wait()
    return _verdict(outcome)


def check_confinement() -> str | None:
    """Run test programs and tests in the sandbox. Returns the reason why it does not confine, or None when it does."""
    verdict = judge_program("def one(): return 1", ["assert one() == 1"])
    if not verdict.passed:
        return verdict.reason
    for action, statement in (("open a socket", "import socket; socket.socket()"), ("fork", "import os; os.fork()")):
        for name, program, test in (("program", statement, "assert True"), ("test", "", statement)):
            if "PermissionError" not in judge_program(program, [test]).reason:
                return f"a {name} could {action}"
    return None


def hides_files() -> bool:
    """Whether programs cannot read the user's files."""
    return confinement.has_landlock()


def _verdict(outcome: dict[str, Any]) -> Verdict:
    if "not_confined" in outcome:
        return Verdict(False, f"not confined: {outcome['not_confined']}")
    if outcome["timed_out"]:
        return Verdict(False, f"ran longer than {WALL_SECONDS:g} seconds", "time")
    if confinement.NOT_CONFINED in {outcome["program"], outcome["judge"]}:
        return Verdict(False, "not confined: a process could not enter the sandbox")
    if not outcome["verdict"]:
        return Verdict(False, f"the tests ended {_in_words(outcome['judge'])}", "time")
    verdict = Decoder(_no_object).decode(outcome["verdict"])
    reason, limit = verdict["reason"], verdict["limit"]
    if limit == "exit":
        killed = outcome["program"] in {-signal.SIGKILL, -signal.SIGXCPU}
        limit = "time" if killed else "exit"
        reason += f" {_in_words(outcome['program'])}"
        reason += f" after {CPU_SECONDS} seconds of CPU time" if killed else ""
    return Verdict(verdict["passed"], reason[:REASON_LENGTH], limit, verdict["judged_by_objects"])


def _in_words(status: int | None) -> str:
    if status is None:
        return "by closing its channel"
    return f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"


def _encode_inputs(program: str, tests: Sequence[str], setup: str, reference: str, imports: Sequence[str]) -> bytes:
    """The program and its tests as bytes for the judge. Raises SyntaxError for tests that are no Python."""
    source = "\n".join([*imports, setup, *tests])
    statements = ast.parse(source).body
    own, reference_imports = _names_of(_imports(statements)), _imports(_parsed(reference))
    loaded = {node.id for node in ast.walk(ast.Module(statements, [])) if isinstance(node, ast.Name)}
    names = loaded - own - (vars(builtins).keys() - _definitions(_parsed(reference)))
    inputs = {
        "program": program.encode(errors="replace").decode(),
        "tests": source,
        "names": sorted(names),
        "imports": "\n".join(map(ast.unparse, _imports(statements))),
        "reference_imports": "\n".join(
            ast.unparse(statement) for statement in reference_imports if _names_of([statement]) & {*names, "*"}
        ),
    }
    return Encoder(_no_object).encode(inputs)


def _parsed(code: str) -> list[ast.stmt]:
    try:
        return ast.parse(code).body
    except (SyntaxError, ValueError):
        return []


def _imports(statements: list[ast.stmt]) -> list[ast.Import | ast.ImportFrom]:
    return [statement for statement in statements if isinstance(statement, ast.Import | ast.ImportFrom)]


def _names_of(imports: Sequence[ast.Import | ast.ImportFrom]) -> set[str]:
    return {alias.asname or alias.name.partition(".")[0] for statement in imports for alias in statement.names}


def _definitions(statements: list[ast.stmt]) -> set[str]:
    return set(_defined(statements))


def _defined(statements: list[ast.stmt]) -> Iterator[str]:
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name
        elif isinstance(statement, ast.Assign):
            yield from (target.id for target in statement.targets if isinstance(target, ast.Name))


def _no_object(*_: object) -> NoReturn:
    raise ValueError("only values reach the sandbox")
