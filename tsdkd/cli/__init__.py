"""The command line: options -> config -> stage -> summary. Torch loads only inside a command that needs it."""

from tsdkd.cli.app import app


def main() -> None:
    app(prog_name="tsdkd")


__all__ = ["app", "main"]
