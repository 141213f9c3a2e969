"""The process that runs the tests. The program's functions and objects are remote; results are values."""

import builtins
from contextlib import suppress
from typing import Any

from tsdkd.stages.eval.sandbox.channel import Channel
from tsdkd.stages.eval.sandbox.codec import CodecError, Decoder, Encoder

DELEGATED = ("iter", "next", "len", "str", "repr", "int", "float", "bool", "getitem", "setitem")
"""Operations that the program does on its objects. No expected value of a test is among their operands."""
COMPARISONS = ("eq", "lt", "le", "gt", "ge")
"""Comparisons of two objects of the program, which the program does."""
LIMITS = frozenset(
    "exit files input memory network objects processes signals system-calls threads time values".split()  # noqa: SIM905
)

REASON_LENGTH = 500
"""Characters; the program chooses parts of a reason, and a pipe takes few bytes at once."""


class ProgramError(Exception):
    """The program ended early, or the tests do not fit the program; `limit` names a limit of the sandbox."""

    def __init__(self, message: str, limit: str = "") -> None:
        super().__init__(message)
        self.limit = limit


class Remote:
    """A function or another object of the program.

    It equals no value, because an object of the program could claim to equal every value. The program compares two
    of its own objects.
    """

    def __init__(self, judge: "Judge", number: int, class_name: str) -> None:
        vars(self).update(_judge=judge, _number=number, _class_name=class_name)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        result, changed = self._judge.request("call", self, arguments, keywords)
        for original, content in zip([*arguments, *keywords.values()], changed, strict=False):
            _replace_content(original, content)
        return result

    def __getattr__(self, name: str) -> Any:
        return self._judge.request("apply", "getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._judge.request("apply", "setattr", self, name, value)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and bool(self._judge.request("apply", "isinstance", value, self))

    def __hash__(self) -> int:
        return hash(self._number)

    def __contains__(self, item: Any) -> bool:
        return any(value == item for value in iter(self))


def _delegate(name: str) -> Any:
    return lambda self, *operands: self._judge.request("apply", name, self, *operands)


def _compare(name: str) -> Any:
    def compare(self: Remote, other: object) -> Any:
        if isinstance(other, Remote):
            return self._judge.request("apply", name, self, other)
        self._judge.compared_class = self._class_name
        return False if name == "eq" else NotImplemented

    return compare


for _name in DELEGATED:
    setattr(Remote, f"__{_name}__", _delegate(_name))
for _name in COMPARISONS:
    setattr(Remote, f"__{_name}__", _compare(_name))


def _replace_content(original: Any, content: Any) -> None:
    """Give a list, dictionary, set or bytearray the content that a call left it with."""
    if type(original) is not type(content):
        return
    if isinstance(original, list | bytearray):
        original[:] = content
    elif isinstance(original, dict | set):
        original.clear()
        original.update(content)


class Judge:
    """Runs tests against a program in the process at the other end of a channel."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.encode = Encoder(self._refer).encode
        self.decode = Decoder(self._resolve).decode
        self.functions: list[Any] = []
        self.exceptions: dict[tuple[str, ...], type[Exception]] = {}
        self.limit = ""
        self.judged_by_objects = False
        self.compared_class = ""

    def run_tests(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run the program, then its tests. Returns the fields of a Verdict. `inputs`: of `verdict.judge_program`."""
        passed, reason = False, ""
        try:
            self.request("run", inputs["program"], inputs["imports"])
            names = self._names(inputs)
            exec(compile(inputs["tests"], "tests", "exec", dont_inherit=True), names)
            passed = True
        except ProgramError as error:
            reason, self.limit = str(error), error.limit or self.limit
        except BaseException as error:
            reason = describe(error)
            if self.compared_class:
                reason += f" (a test compares an object of the program, of class {self.compared_class}, with a value)"
                self.limit = self.limit or "objects"
        return {
            "passed": passed,
            "reason": reason[:REASON_LENGTH],
            "limit": "" if passed else self.limit,
            "judged_by_objects": self.judged_by_objects,
        }

    def request(self, name: str, *arguments: Any) -> Any:
        """Send a request to the program's process. Raises what the program raises, or ProgramError."""
        reply = self._exchange((name, *arguments))
        while reply[0] == "calls":
            reply = self._exchange(self._call_back(*reply[1:]))
        if reply[0] == "returned":
            return reply[1]
        error = self._exception(*reply[1:])
        if isinstance(error, StopIteration) and arguments[0] != "next":
            raise ProgramError("the program raised StopIteration")  # it would end the loop of a test
        raise error

    def _exchange(self, message: tuple[Any, ...]) -> list[Any]:
        """Send a message and return the reply, without the limit of the sandbox that it names."""
        try:
            self.channel.send(self.encode(message))
            reply: list[Any]
            *reply, limit = self.decode(self.channel.receive())
        except (EOFError, OSError):
            raise ProgramError("the program ended its process", "exit") from None
        except CodecError as error:
            raise ProgramError(f"no value: {error}", "values") from None
        self.limit = limit if limit in LIMITS else ""
        return reply

    def _call_back(self, number: int, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The program calls a function that a test passed to it."""
        try:
            return "result", self.functions[-1 - number](*arguments)
        except Exception as error:
            return "error", type(error).__name__, str(error)

    def _names(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The names of the tests: own modules, and the program's functions and objects."""
        names: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
        imported: dict[str, Any] = {}
        objects = False
        exec(inputs["reference_imports"], imported)
        for name in inputs["names"]:
            kind, *content = self.request("get", name)
            if kind == "missing":
                continue
            if name in imported:
                names[name] = imported[name]
            elif kind == "exception":
                names[name] = self._exception_class(tuple(content[0]))
            else:
                names[name] = content[0]
                objects |= kind != "function" and isinstance(content[0], Remote)
        self.judged_by_objects = objects
        return names

    def _exception(self, class_names: list[str], message: str) -> Exception:
        kind = self._exception_class(tuple(class_names))
        if kind is not ProgramError:
            with suppress(TypeError):  # such as UnicodeDecodeError, which has more arguments
                return kind(message)
        return ProgramError(f"{class_names[0]}: {message}")

    def _exception_class(self, names: tuple[str, ...]) -> type[Exception]:
        """The class of an exception of the program: a built-in one, or one of the same name; ProgramError for exits."""
        if not names:
            return Exception
        known = getattr(builtins, str(names[0]), None)
        if isinstance(known, type) and issubclass(known, BaseException):
            return known if issubclass(known, Exception) else ProgramError
        if names not in self.exceptions:
            self.exceptions[names] = type(str(names[0]), (self._exception_class(names[1:]),), {})
        return self.exceptions[names]

    def _refer(self, value: Any) -> int:
        if isinstance(value, Remote):
            return int(vars(value)["_number"])
        if not callable(value):
            raise ProgramError(f"the tests pass a {type(value).__name__} to the program", "objects")
        self.functions.append(value)
        return -len(self.functions)

    def _resolve(self, number: int, class_name: str) -> Any:
        self.judged_by_objects = True
        return Remote(self, number, class_name)


def describe(error: BaseException) -> str:
    """The class and message of an error; the class alone if a value in the message has no text."""
    with suppress(Exception):  # the program's own __repr__, a number of too many digits
        return f"{type(error).__name__}: {error}"
    return type(error).__name__
