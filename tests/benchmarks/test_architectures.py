"""benchmarks/architectures.py: two architectures pass, and a wrong value fails."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from benchmarks import architectures
from tsdkd.stages.data import scoring


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_stage_equals_the_reference(architecture: str) -> None:
    tracebacks: list[str] = []
    cells = architectures.run_checks(architecture, tracebacks)
    assert not tracebacks, tracebacks[0]
    assert {column: cell for column, cell in cells.items() if cell != "ok"} == {}


def test_a_difference_fails_the_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An entropy that is wrong by a thousandth."""
    entropy: Callable[[Tensor], Tensor] = scoring.entropy_of
    monkeypatch.setattr(scoring, "entropy_of", lambda log_probs: 1.001 * entropy(log_probs))
    checks = {name: architectures.CHECKS[name] for name in ("generate", "score")}
    monkeypatch.setattr(architectures, "CHECKS", checks)
    page = tmp_path / "page.md"
    with pytest.raises(SystemExit) as end:
        architectures.main(["--only", "llama", "--markdown", str(page)])
    assert end.value.code
    assert "| llama | ok | FAILED (differs) (1) |" in page.read_text()
    assert "student entropy: differs by 0.005" in page.read_text()
