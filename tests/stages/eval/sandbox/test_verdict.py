"""A program cannot change its verdict, and the verdict names the limit that the program hits."""

from ctypes.util import find_library
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.robustness import verdicts
from benchmarks.robustness.verdict_programs import FORGERIES
from tsdkd.stages.eval.sandbox.judge import REASON_LENGTH
from tsdkd.stages.eval.sandbox.verdict import Verdict, judge_program
from tsdkd.stages.eval.scorers import score_mbpp

pytestmark = pytest.mark.skipif(find_library("seccomp") is None, reason="needs libseccomp")

FORGED = dict(zip(FORGERIES, verdicts.forgeries(seed=0), strict=True))


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_program_that_solves_nothing_fails(forgery: str) -> None:
    task, program, tests = FORGED[forgery]
    assert not judge_program(program, tests, "", task.solution).passed


@pytest.mark.parametrize("forgery", [name for name in FORGERIES if "everything" in name or "ANY" in name])
def test_an_object_that_claims_to_equal_everything_equals_no_value(forgery: str) -> None:
    assert not judge_program(FORGERIES[forgery].replace("NAME", "double"), ["assert double(3) == 6"]).passed


ONE = "def f(): return 1"
RIGHT = {
    "sets sys.argv": f"import sys\nsys.argv = ['a', '-v']\n{ONE}",
    "ends with sys.exit(0)": f"import sys\n{ONE}\nsys.exit(0)",
    "ends with unittest.main()": f"import unittest\nclass T(unittest.TestCase): pass\n{ONE}\nunittest.main()",
    "uses asyncio": "import asyncio\nasync def g():\n    await asyncio.sleep(0)\n    return 1\n"
    "async def h():\n    return min(await asyncio.gather(g(), g()))\ndef f(): return asyncio.run(h())",
    "prints much": f"print('x' * 10 ** 7)\n{ONE}",
    "reads all of the empty input": f"import sys\nassert sys.stdin.read() == ''\n{ONE}",
    "recurses": "import sys\nsys.setrecursionlimit(10 ** 6)\n"
    "def g(n): return n and 1 + g(n - 1)\ndef f(): return g(20_000) // 20_000",
    "writes to memory": "import io, tempfile\ndef f():\n    with tempfile.SpooledTemporaryFile() as file:\n"
    "        return file.write(b'x')",
    "has a main": f"{ONE}\nif __name__ == '__main__': print(f())",
    "defines a data class": "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\n"
    "class P:\n    x: int\ndef f(): return P(1).x",
    "returns a number of a subclass": "from decimal import Decimal\ndef f(): return Decimal('1.0')",
}


@pytest.mark.parametrize("habit", RIGHT)
def test_a_right_program_passes(habit: str) -> None:
    assert judge_program(RIGHT[habit], ["assert f() == 1"]) == Verdict(True)


LIMITED = {
    "threads": "import threading\ndef f():\n    threading.Thread(target=print).start()\n    return 1",
    "files": "import tempfile\ndef f():\n    with tempfile.TemporaryFile() as file: return file.write(b'x')",
    "input": "def f(): return int(input())",
    "processes": "import subprocess\ndef f(): return len(subprocess.run(['true']))",
    "network": "import socket\ndef f(): return socket.create_connection(('localhost', 80)) and 1",
    "signals": "import os\ndef f(): return os.kill(os.getpid(), 0) or 1",
    "exit": "import os\ndef f(): os._exit(0)",
    "values": "def f(): return [0] * 2_000_000",
    "objects": "class A: pass\ndef f(): return A()",
}


@pytest.mark.parametrize("limit", LIMITED)
def test_the_limit_that_a_program_hits_is_named(limit: str) -> None:
    found = judge_program(LIMITED[limit], ["assert f() == 1"])
    assert (found.passed, found.limit) == (False, limit)
    assert found.reason


TESTS_OF_VALUES = {
    "equality": ("def f(x): return x + 1", ["assert f(1) == 2", "assert f(1) == 2.0", "assert f(True) == 2"]),
    "sets": ("def f(x): return [x, x]", ["assert set(f(1)) == set([1])"]),
    "closeness": (
        "def f(x): return x / 3",
        ["import math", "assert math.isclose(f(1), 1 / 3)", "assert f(3) is not 0"],
    ),
    "nested calls": ("def g(x): return (x, x)\ndef f(x): return sum(x)", ["assert f(g(2)) == 4"]),
    "a function with a built-in name": ("def sum(a, b): return a + b", ["assert sum(10, 15) == 25"]),
    "a module of the solution": (
        "import sys\ndef f(x): return sys.getsizeof(x)",
        ["assert f('a') == sys.getsizeof('a')"],
    ),
    "built-in exceptions": (
        "def f(x): raise ValueError('no')",
        ["try:\n    f(1)\n    raise SystemError\nexcept ValueError as e:", "    assert str(e) == 'no'"],
    ),
    "functions as arguments": (
        "def f(g, x): return [g(y) for y in x]",
        ["assert f(lambda y: y * 2, [1, 2]) == [2, 4]", "assert f(int, '12') == [1, 2]"],
    ),
    "changed arguments": ("def f(x): x.sort()", ["x = [3, 1]", "f(x)", "assert x == [1, 3]"]),
    "keywords": ("def f(x, *, k=1): return x * k", ["assert f(2, k=3) == 6"]),
    "imports for the program": ("def f(x): return math.floor(x)", ["import math", "assert f(1.5) == 1"]),
    "the check of a solution": (
        "def f(x): return x",
        ["def check(candidate):\n    assert candidate(1) == 1", "check(f)"],
    ),
}


@pytest.mark.parametrize("need", TESTS_OF_VALUES)
def test_tests_are_judged_by_values(need: str) -> None:
    program, tests = TESTS_OF_VALUES[need]
    assert judge_program(program, tests, "", program) == Verdict(True)
    assert not judge_program(program, [*tests, "assert f(None, None) == 5"], "", program).passed


TREE = "class Node:\n    def __init__(self, value): self.value, self.left = value, None\n"
TESTS_OF_OBJECTS = {
    "a class": (
        f"{TREE}def f(n): return 1 + f(n.left) if n else 0",
        "root = Node(1)\nroot.left = Node(2)",
        "f(root) == 2",
    ),
    "an attribute": (f"{TREE}def f(x): return Node(x)", "", "f(3).value == 3"),
    "equality of two objects": ("from enum import Enum\nC = Enum('C', 'R')\ndef f(): return C.R", "", "f() == C.R"),
    "an iterator": ("def f(n): yield from range(n)", "", "list(f(3)) == [0, 1, 2] and 2 in f(3) and next(f(1)) == 0"),
    "an instance": (f"{TREE}def f(x): return Node(x)", "", "isinstance(f(3), Node)"),
    "a text": ("class A:\n    def __str__(self): return 'a'\ndef f(): return A()", "", "str(f()) == 'a'"),
    "a function": ("def f(x):\n    def g(y): return x + y\n    return g", "", "f(1)(2) == 3"),
}


@pytest.mark.parametrize("need", TESTS_OF_OBJECTS)
def test_tests_are_judged_by_objects(need: str) -> None:
    program, setup, condition = TESTS_OF_OBJECTS[need]
    assert judge_program(program, [f"assert {condition}"], setup) == Verdict(True, judged_by_objects=True)
    assert not judge_program(program, [f"assert not ({condition})"], setup).passed


def test_exceptions_of_the_program_are_caught_by_their_names() -> None:
    program = "class E(ValueError): pass\nclass F(Exception): pass\ndef f(): raise E('no')"
    test = "try:\n    f()\nexcept F:\n    assert False\nexcept E as error:\n    assert str(error) == 'no'"
    assert judge_program(program, [test]).passed


def test_an_exception_cannot_end_the_loop_of_a_test() -> None:
    """In one process, `map` takes StopIteration for its end."""
    assert not judge_program("def f(x): raise StopIteration", ["assert all(map(f, [1, 2]))"]).passed


def test_a_module_of_the_solution_is_not_the_programs() -> None:
    solution = "import math\ndef f(x): return x"
    program = "class math: isclose = lambda *_: True\ndef f(x): return 0"
    assert not judge_program(program, ["assert math.isclose(f(3), 3)"], "", solution).passed
    assert "NameError" in judge_program("def f(x): return x", ["assert math.isclose(f(3), 3)"], "", solution).reason


def test_the_reason_of_a_failure() -> None:
    assert judge_program(ONE, ["assert f() == 2, 'no'"]) == Verdict(False, "AssertionError: no")
    assert judge_program("def f(:", ["assert f()"]).reason.startswith("SyntaxError")
    assert judge_program("import sys; sys.exit(1)", ["assert True"]) == Verdict(False, "SystemExit: 1")
    assert judge_program(ONE, ["assert g() == 1"]).reason == "NameError: name 'g' is not defined"
    assert judge_program(ONE, ["assert ("]).reason == "the tests are no Python (SyntaxError)"
    assert judge_program("", []) == Verdict(False, "there are no tests")


LONG = {
    "a message": ("raise ValueError('x' * 10 ** 6)", "assert True"),
    "a class name": ("def f(): raise type('x' * 10 ** 6, (Exception,), {})", "f()"),
    "a missing key": ("def f(): return 'x' * 10 ** 6", "{}[f()]"),
}


@pytest.mark.parametrize("part", LONG)
def test_a_reason_is_cut(part: str) -> None:
    program, test = LONG[part]
    found = judge_program(program, [test])
    assert not found.passed
    assert "xxx" in found.reason
    assert len(found.reason) <= REASON_LENGTH


@pytest.mark.parametrize(
    "program",
    ["class A:\n    def __repr__(self): raise SystemError\ndef f(): return A()", "def f(): return 10 ** 5000"],
)
def test_a_reason_whose_value_has_no_text_names_the_error(program: str) -> None:
    assert judge_program(program, ["{}[f()]"]).reason == "KeyError"


def test_a_score_holds_the_verdict() -> None:
    doc = {"test_list": ["assert f() == 1"], "test_setup_code": "", "code": ONE}
    assert score_mbpp(doc, [ONE]) == {"pass_at_1": 1.0}
    (score,) = score_mbpp(doc, [LIMITED["threads"]]).values()
    assert (score, score.verdict.limit) == (0.0, "threads")


def test_every_solution_passes_a_sample_of_real_rows(real_data: Path) -> None:
    """Row 367 needs the program's class, row 596 its module, row 40 a Counter."""
    files = [real_data / "benchmarks" / "mbpp" / f"{split}.parquet" for split in ("test", "validation")]
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    rows = [row for row in rows if row["task_id"] in {*range(11, 16), 40, 88, 367, 596}]
    assert len(rows) == 9
    found = {row["task_id"]: score_mbpp(row, [row["code"]])["pass_at_1"].verdict for row in rows}
    assert found == {number: Verdict(True, judged_by_objects=number == 367) for number in found}
