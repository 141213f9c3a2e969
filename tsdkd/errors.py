"""The errors a user can meet: each says what happened (cause) and what to do (remedy), one line each."""


class TsdkdError(Exception):
    """Something failed that is nobody's typing mistake: a full disk, a NaN loss. Exit code 1."""

    exit_code = 1

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause} {remedy}")
        self.cause = cause
        self.remedy = remedy


class InputError(TsdkdError, ValueError):
    """An option, file, model or tensor that cannot be used as given. Exit code 2."""

    exit_code = 2


class ArtifactError(InputError):
    """An artifact that is missing, broken, unfinished, of another kind, or made from something else. Exit code 2."""


class OtherRankError(TsdkdError):
    """Another process of this run failed and says why; this one only ends."""

    def __init__(self) -> None:
        super().__init__("Another process of this run failed.", "See what it says.")
