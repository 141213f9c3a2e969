"""Tasks, and programs that try to pass their tests without solving them. `NAME` stands for the tested function."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    name: str
    solution: str
    arguments: str
    """Expressions of the arguments of each test, with `random` as a seeded source."""
    test: str = "assert {call} == {answer}"


TASKS = (
    Task("double", "def double(n):\n    return 2 * n", "random.randrange(100, 999)"),
    Task("distinct", "def distinct(items):\n    return set(items)", "random.choices('abcdefgh', k=6)"),
    Task(
        "spread",
        "def spread(items):\n    return min(items), max(items)",
        "random.sample(range(100), 5)",
        "assert tuple({call}) == tuple({answer})",
    ),
    Task(
        "counts",
        "from collections import Counter\ndef counts(text):\n    return Counter(text)",
        "''.join(random.choices('xyz', k=9))",
    ),
    Task(
        "mean",
        "import math\ndef mean(items):\n    return sum(items) / len(items)",
        "random.sample(range(100), 3)",
        "assert math.isclose({call}, {answer}, rel_tol=1e-9)",
    ),
    Task("turn", "def turn(z):\n    return z * 1j", "complex(random.randrange(9), random.randrange(9))"),
    Task("flip", "def flip(data):\n    return data[::-1]", "random.randbytes(5)"),
    Task(
        "pairs",
        "def pairs(items):\n    return [list(p) for p in zip(items, items[1:])]",
        "random.sample(range(50), 4)",
        "assert set(map(tuple, {call})) == set(map(tuple, {answer}))",
    ),
)

_REPORT = """
import os, re, sys
arguments = list(sys.argv)
def forge(frame):
    while frame:
        for value in list(frame.f_locals.values()):
            if isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value):
                for descriptor in {*(int(a) for a in arguments[1:] if a.isdigit()), *range(1, 16)}:
                    try:
                        os.write(descriptor, value.encode())
                    except OSError:
                        pass
                os._exit(0)
        frame = frame.f_back
def NAME(*_): pass
"""
"""Looks for the token of a sandbox that runs the tests in the program's own process, and reports it."""

_EQUAL = """
class Equal{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
"""
_BROADCAST = """
import os
def broadcast(data):
    for descriptor in range(1, 32):
        try:
            os.write(descriptor, data)
        except OSError:
            pass
"""
_ENCODED = """
import tsdkd.stages.eval.sandbox.codec as codec
encode = codec.Encoder(lambda _: 0).encode
passed = encode({'passed': True, 'reason': '', 'limit': '', 'judged_by_objects': False})
"""

FORGERIES = {
    "frames": _REPORT + "forge(sys._getframe())",
    "frames in the function": _REPORT + "def NAME(*_): forge(sys._getframe())",
    "a traceback": _REPORT
    + "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    forge(error.__traceback__.tb_frame)",
    "inspect": _REPORT + "import inspect\nfor entry in inspect.stack():\n    forge(entry.frame)",
    "the garbage collector": _REPORT
    + """import gc
class Frame: f_back = None
for found in gc.get_objects():
    if isinstance(found, dict):
        Frame.f_locals = found
        forge(Frame)
    elif type(found).__name__ == "frame":
        forge(found)""",
    "its own memory": _REPORT
    + """class Frame: f_back = None
for line in open("/proc/self/maps"):
    start, end = (int(n, 16) for n in line.split()[0].split("-"))
    if "rw" not in line: continue
    with open("/proc/self/mem", "rb", 0) as memory:
        memory.seek(start)
        for token in re.findall(rb"(?<![0-9a-f])[0-9a-f]{32}(?=\\n)", memory.read(end - start)):
            Frame.f_locals = {"token": token.decode()}
            forge(Frame)""",
    "the text of an exception": _REPORT
    + "class Loud(Exception):\n    def __str__(self): forge(sys._getframe()); return ''\nraise Loud",
    "a replaced os.write": _REPORT
    + "real = os.write\ndef write(*_):\n    os.write = real\n    forge(sys._getframe())\nos.write = write",
    "a handler at exit": _REPORT + "import atexit\natexit.register(lambda: forge(sys._getframe()))",
    "a timer": _REPORT
    + """import signal, time
signal.signal(signal.SIGALRM, lambda _, frame: forge(frame))
signal.setitimer(signal.ITIMER_REAL, 0.01)
time.sleep(0.1)""",
    "a profile function": _REPORT + "sys.setprofile(lambda frame, *_: forge(frame))",
    "a jump over the tests": """import sys
def NAME(*_):
    def trace(frame, event, _):
        if event == "line" and frame.f_code.co_name == "<module>":
            frame.f_lineno = max(line for *_, line in frame.f_code.co_lines() if line)
            return None
        return trace
    frame = sys._getframe(1)
    frame.f_trace = trace
    sys.settrace(trace)
    return None""",
    "an object that equals everything": _EQUAL.format(base="") + "def NAME(*_): return Equal()",
    "a number that equals everything": _EQUAL.format(base="(int)") + "def NAME(*_): return Equal(1)",
    "a list that equals everything": _EQUAL.format(base="(list)") + "def NAME(*_): return Equal()",
    "items that equal everything": _EQUAL.format(base="") + "def NAME(*_): return [Equal(), Equal()]",
    "an object that has every attribute": """class Yes:
    def __getattr__(self, name): return self
    def __call__(self, *_): return self
    def __iter__(self): return iter((self,))
for name in "eq ne lt le gt ge add sub mul truediv radd rsub abs getitem contains".split():
    setattr(Yes, f"__{name}__", lambda self, *_: self)
def NAME(*_): return Yes()""",
    "unittest.mock.ANY": "from unittest.mock import ANY\ndef NAME(*_): return ANY",
    "a shadowed set, tuple and math": """set = tuple = lambda *_: 0
class math: isclose = lambda *_, **__: True
def NAME(*_): return ()""",
    "replaced built-ins": """import builtins, math
builtins.set = builtins.tuple = builtins.map = lambda *_: 0
math.isclose = lambda *_, **__: True
def NAME(*_): return 0""",
    "StopIteration": "def NAME(*_): raise StopIteration",
    "an end with status 0": "import os\ndef NAME(*_): os._exit(0)",
    "sys.exit(0) in the function": "import sys\ndef NAME(*_): sys.exit(0)",
    "a line that goes on": "def NAME(*_): pass\nif False: \\",
    "a verdict on every descriptor": _BROADCAST + _ENCODED + "broadcast(passed)\nos._exit(0)",
    "a frame on every descriptor": _BROADCAST
    + _ENCODED
    + "broadcast(len(passed).to_bytes(4, 'big') + passed)\ndef NAME(*_): broadcast(passed)",
    "replies before the requests": _BROADCAST
    + _ENCODED
    + """reply = encode(('returned', True, ''))
broadcast((len(reply).to_bytes(4, 'big') + reply) * 9)
def NAME(*_): pass""",
    "malformed frames": _BROADCAST + "def NAME(*_): broadcast(b'\\0\\0\\0\\5l\\xff\\xff\\xff\\xff')",
    "nested and huge values": """value = []
for _ in range(10 ** 5): value = [value]
def NAME(*_): return value""",
    "the memory and files of other processes": """import os, pathlib
found = b""
for process in pathlib.Path("/proc").iterdir():
    if process.name.isdigit() and int(process.name) != os.getpid():
        for file in (process / "fd").iterdir():
            found += file.read_bytes()
def NAME(*_): raise ValueError(found)""",
    "a signal to its judge": "import os\nfor n in range(-3, 9): os.kill(os.getpid() + n, 9) if n else None",
    "a changed integer": """import ctypes
for number in range(-5, 257):
    ctypes.c_uint32.from_address(id(number) + 24).value = 1
def NAME(*_): return 1""",
}
"""Programs that solve nothing, by what they try."""

READER = """import ast, math
def literal(node):
    try:
        return [ast.literal_eval(node)]
    except (ValueError, TypeError):
        return []
def NAME(x):
    for test in TESTS:
        nodes = list(ast.walk(ast.parse(test)))
        argument = next(n.args[0] for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "NAME")
        if literal(argument) == [x]:
            return next(value for n in nodes if n is not argument for value in literal(n))
"""
"""Takes the answer from the text of the tests."""
