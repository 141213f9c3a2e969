"""The errors that the command line prints: one line of cause, one line of remedy, and an exit code."""

import difflib
from collections.abc import Iterable
from typing import Any


class TsdkdError(Exception):
    """A failure that the command line did not cause, such as a full disk. Exit code 1."""

    exit_code = 1

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause} {remedy}")
        self.cause = cause
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors of worker processes reach the driver pickled."""
        return type(self), (self.cause, self.remedy), self.__dict__


class NotFiniteError(TsdkdError):
    """A loss, gradient or logit that is NaN or infinite. Exit code 3."""

    exit_code = 3


class InputError(TsdkdError, ValueError):
    """An option, file, model or tensor that cannot be used. Exit code 2."""

    exit_code = 2


class ArtifactError(InputError):
    """An artifact that is missing, damaged, partial, of another kind, or made from another parent. Exit code 2."""


class OtherRankError(TsdkdError):
    """Another rank failed and reports why; this rank only ends."""

    def __init__(self) -> None:
        super().__init__("Another rank of this run failed.", "Read its message.")


def nearest(name: object, known: Iterable[str]) -> str:
    """The known name that is most like an unknown one, for a remedy."""
    return difflib.get_close_matches(str(name), list(known), 1, 0)[0]


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the error's class name if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
