"""Commands called as by a user."""

from typer.testing import CliRunner

from tsdkd.cli import app


def run(*command: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    return result.stdout


def refuse(*command: object, code: int = 2) -> tuple[str, str]:
    """Run a command that must fail. Returns its cause and its remedy."""
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)  # a message, not a traceback
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error:", "try:"))]
    assert [line.split(":")[0] for line in lines] == ["error", "try"], result.stderr
    assert "Traceback" not in result.output
    return lines[0].removeprefix("error:").strip(), lines[1].removeprefix("try:").strip()
