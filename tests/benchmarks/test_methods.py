"""The benchmark of methods runs at tiny sizes, and names what is refused."""

from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import methods
from benchmarks.methods import GKD, TINY, Arm, Bench, arms_of, measure, show
from tsdkd.stages.methods import METHODS


def test_each_way_to_train_is_measured_or_refused(
    student: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(width=120)
    bench = Bench(tmp_path, str(student), str(teacher), TINY, console)
    runs = measure(bench, arms_of(["reopold"]), ("hidden", "topk", "online"))
    trained = {(arm.name, mode) for (arm, mode), run in runs.items() if run.trained}
    both = {(name, mode) for name in ("gkd", "reopold") for mode in ("hidden", "online")}
    assert trained == both | {("gkd", "topk")}
    assert runs[Arm("reopold"), "hidden"].ratio > 0
    show(runs, console)
    printed = capsys.readouterr().out
    assert "(1) The teacher's signal 'topk' does not give the feature teacher_log_prob." in printed
    assert "5 runs trained" in printed
    assert "student, online, reopold: CPU s" in printed


def test_every_method_has_an_arm_and_responses() -> None:
    arms = arms_of([])
    assert {arm.name for arm in arms} == {*METHODS}
    assert {arm.policy for arm in arms} == {"student", "teacher", "speculative"}


@pytest.mark.parametrize(("losses", "changed"), [((1.0, float("nan")), 0.5), ((1.0, 0.5), 0.0)])
def test_a_run_that_does_not_train_is_named(
    losses: tuple[float, ...], changed: float, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = dict.fromkeys(methods.PARTS, 1.0)
    good = methods.Run(seconds=seconds, losses=(1.0,), changed=0.5)
    bad = methods.Run(seconds=seconds, losses=losses, changed=changed)
    show({(GKD, "online"): good, (Arm("tip"), "online"): bad}, Console(width=120))
    assert "tip, online" in capsys.readouterr().out
