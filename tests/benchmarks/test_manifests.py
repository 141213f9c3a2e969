"""benchmarks/robustness/manifests.py: commands that look at damaged artifacts end without a raw error."""

from pathlib import Path

from benchmarks.robustness.manifests import ARTIFACTS, Workspace, campaign
from tests.helpers.runs import make_run

READ = ("artifact verify {a}", "eval --compare {r}", "report {r} --html {r}/report.html")


def test_no_damage_is_a_raw_error(tmp_path: Path) -> None:
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies" / "notes.parquet").write_text("mine")
    make_run(tmp_path / "run")
    raw: list[str] = []
    counts = campaign(Workspace(tmp_path), 0, 8, raw.append, dict.fromkeys(ARTIFACTS, READ))
    assert raw == []
    kinds = {kind for _, kind in counts}
    assert kinds == {"well", "refused"}
