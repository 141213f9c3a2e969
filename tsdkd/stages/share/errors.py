"""Errors of file systems and of the hub, as one line of cause and one of remedy, without secrets."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tsdkd.artifacts.disk import causes, disk_failure
from tsdkd.errors import InputError, TsdkdError, first_line

CREDENTIALS = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
    "hf": "Set HF_TOKEN, or run `hf auth login`",
}
"""How a library finds its credentials, by protocol."""
AGAIN = "Run the same command again; it copies only the missing parts."
_SECRETS = re.compile(r"(?<=://)[^\s/@'\"<>]+@|(?<=/)([^\s/?'\"<>]*)\?[^\s'\"<>]*")
"""The user of a URL may have a password, and its query may hold a signature."""


@contextmanager
def translate_errors(url: str) -> Iterator[None]:
    """Raise InputError or TsdkdError for an error of the file system or of the hub that holds `url`."""
    try:
        yield
    except TsdkdError:
        raise
    except Exception as error:
        raise _described(url, error) from error


def _described(url: str, error: Exception) -> TsdkdError:
    if failure := disk_failure(error):
        return failure
    login = CREDENTIALS.get(url.split("://", maxsplit=1)[0], "Check its credentials")
    for cause in causes(error):
        if found := _refusal(url, cause, login):
            return found
    return TsdkdError(f"{url} failed ({type(error).__name__}: {_reason(error)}).", AGAIN)


def _reason(error: BaseException) -> str:
    """The first two lines of a message: the hub's second line names the cause."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [first_line(error)]
    return _SECRETS.sub(r"\1", " ".join(lines[:2])).rstrip(".")


def _refusal(url: str, error: BaseException, login: str) -> InputError | None:
    """The error for missing credentials or permissions, for a missing or a changed store; None for another."""
    reason, status = _reason(error), getattr(getattr(error, "response", None), "status_code", None)
    if re.search("Credential|TokenNotFound", type(error).__name__):
        return InputError(f"{url} needs credentials, and none were found ({reason}).", f"{login}.")
    if isinstance(error, PermissionError) or status in {401, 403}:
        return InputError(f"{url} refuses access ({reason}).", f"{login}, and check their permissions.")
    if isinstance(error, FileNotFoundError) or status == 404:
        return InputError(f"{url} does not exist ({reason}).", "Check its name; make a bucket or branch first.")
    if status == 412:
        return InputError(f"{url} changed during the push ({reason}).", AGAIN)
    return None
