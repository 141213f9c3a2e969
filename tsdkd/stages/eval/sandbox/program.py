"""The process that runs the program. It answers the judge's requests and knows neither tests nor verdict.

A program can forge its messages, so the judge takes them as values only.
"""

import builtins
import errno
import operator
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from tsdkd.stages.eval.sandbox.channel import Channel
from tsdkd.stages.eval.sandbox.codec import CodecError, Decoder, Encoder

MESSAGE_LENGTH = 300
MUTABLE = (list, dict, set, bytearray)
REFUSED_EVENTS = {
    "_thread.start_": "threads",
    "os.fork": "processes",
    "os.exec": "processes",
    "os.posix_spawn": "processes",
    "os.system": "processes",
    "subprocess.Popen": "processes",
    "socket.connect": "network",
    "socket.bind": "network",
    "socket.getaddrinfo": "network",
    "socket.gethostby": "network",
    "os.kill": "signals",
    "signal.pthread_kill": "signals",
    "os.mkdir": "files",
    "os.rename": "files",
    "os.remove": "files",
    "os.rmdir": "files",
    "os.truncate": "files",
    "os.link": "files",
    "os.symlink": "files",
    "os.chmod": "files",
    "builtins.input": "input",
}
"""Audit events of refused actions, by prefix, with the limit that they hit."""
FUNCTIONS = ("function", "builtin_function_or_method", "method", "_lru_cache_wrapper", "partial")
"""Classes of functions; tests that need other objects are judged by objects."""
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Program:
    """The program with its names, and the objects that the judge refers to by number."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.encode = Encoder(self._refer).encode
        self.decode = Decoder(self._resolve).decode
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}
        module = ModuleType("__main__")
        vars(module)["__builtins__"] = builtins
        sys.modules["__main__"], self.names = module, vars(module)
        self.limit = ""

    def serve(self) -> None:
        """Answer requests until the judge closes the channel."""
        sys.addaudithook(self._note_limit)
        while True:
            try:
                self.answer(self.decode(self.channel.receive()))
            except (EOFError, OSError):
                return

    def answer(self, request: tuple[Any, ...]) -> None:
        """Answer a request: a name and its arguments."""
        name, *arguments = request
        try:
            result = getattr(self, f"_{name}")(*arguments)
            reply = self.encode(("returned", result, self.limit))
        except CodecError:
            reply = self.encode(("raised", ["ValueError"], "a value is too large or nested too deeply", "values"))
        except BaseException as error:
            reply = self.encode(("raised", *describe(error), self.limit or limit_of(error)))
        self.channel.send(reply)

    def _run(self, program: str, imports: str) -> None:
        try:
            exec(compile(program, "program", "exec", dont_inherit=True), self.names)
        except SystemExit as error:
            if error.code:
                raise
        exec(imports, self.names)

    def _get(self, name: str) -> tuple[Any, ...]:
        """A name's kind and value."""
        if name not in self.names:
            return ("missing",)
        value = self.names[name]
        if isinstance(value, type) and issubclass(value, BaseException):
            return ("exception", class_names(value))
        return ("function" if type(value).__name__ in FUNCTIONS else "object", value)

    def _call(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, list[Any]]:
        """The result, and the arguments if the call changed them."""
        passed = [*arguments, *keywords.values()]
        mutable = any(isinstance(value, MUTABLE) for value in passed)
        before = self.encode(passed) if mutable else b""
        result = function(*arguments, **keywords)
        return result, passed if mutable and self.encode(passed) != before else []

    def _apply(self, name: str, *arguments: Any) -> Any:
        """A function of `builtins` or `operator`."""
        return (getattr(builtins, name, None) or getattr(operator, name))(*arguments)

    def _refer(self, value: Any) -> int:
        number = self.numbers.setdefault(id(value), len(self.objects))
        if number == len(self.objects):
            self.objects.append(value)  # which keeps its id
        return number

    def _resolve(self, number: int, _: str) -> Any:
        return self.objects[number] if number >= 0 else self._function_of_tests(number)

    def _function_of_tests(self, number: int) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.channel.send(self.encode(("calls", number, arguments, self.limit)))
            while True:
                kind, *content = self.decode(self.channel.receive())
                if kind == "result":
                    return content[0]
                if kind == "error":
                    raise getattr(builtins, content[0], Exception)(content[1])
                self.answer((kind, *content))

        return call

    def _note_limit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            mode, flags = arguments[1:]
            if (isinstance(flags, int) and flags & WRITE_FLAGS) or set(mode or "") & set("wax+"):
                self.limit = "files"
        else:
            self.limit = next((limit for start, limit in REFUSED_EVENTS.items() if event.startswith(start)), self.limit)


def class_names(kind: type) -> list[str]:
    return [base.__name__ for base in kind.__mro__ if base is not object]


def describe(error: BaseException) -> tuple[list[str], str]:
    """The names of an exception's classes, and its message."""
    try:
        message = str(error)[:MESSAGE_LENGTH]
    except BaseException:  # the program's own __str__
        message = ""
    return class_names(type(error)), message


def limit_of(error: BaseException) -> str:
    """The limit of the sandbox that an exception shows."""
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "threads"
    if isinstance(error, PermissionError):
        return "files" if error.errno == errno.EACCES else "system-calls"
    return ""
