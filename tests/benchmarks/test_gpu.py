"""The scripts for a GPU run at tiny sizes on a CPU, and keep their figures whatever ends them."""

import ast
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.gpu import b_objective, d_training, device, f_study, run
from benchmarks.gpu.figures import ATTEMPTS, DEVICE_LOST, Figures, Options, OutOfTimeError, Target, within
from benchmarks.gpu.models import random_model
from benchmarks.gpu.training import RandomSource
from tests.helpers.benchmark_rows import write_rows
from tests.helpers.models import save_tiny_model
from tsdkd.cli import app

ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks" / "gpu"
SCRIPTS = ("a_devices", "b_objective", "c_score", "d_training", "e_sampling", "g_optimizers")
FAKE = """
import os, sys, time
from benchmarks.gpu.figures import Figures, Options, argument_parser

options = argument_parser("", 60).parse_args()
figures = Figures(NAME, "A fake", ["value"], Options(options.out, True, options.seconds, "cpu"), {"device": "none"})

def value(number):
    with open(options.out / "log.txt", "a") as log:
        log.write(f"{NAME}{number} ")
    return {"value": number}
"""


def main_of(script: str, *words: str) -> int:
    """Run a script in this process -> its exit code."""
    main = importlib.import_module(f"benchmarks.gpu.{script}").main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, "--tiny", *words])
        with pytest.raises(SystemExit) as exit_:
            main()
    return int(exit_.value.code or 0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_measures_all_that_a_cpu_can_and_nothing_twice(script: str, tmp_path: Path) -> None:
    """Peers that need a GPU, or are not installed, are the only rows that may fail."""
    code = main_of(script, "--out", str(tmp_path), "--seconds", "900")
    content = json.loads((tmp_path / f"{script}.json").read_text())
    assert all(name.startswith(("TRL", "Liger")) for name in content["failed"]), content["failed"]
    assert code == bool(content["failed"])
    assert content["figures"]
    assert content["environment"]["tiny"] == "True"
    assert not content["begun"]
    if not content["failed"]:
        assert main_of(script, "--out", str(tmp_path)) == 0
        assert json.loads((tmp_path / f"{script}.json").read_text()) == content


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """Arguments of f at a tiny size, and the list of its commands, which run in this process."""
    commands: list[str] = []

    def run_in_process(command: str, log: Path, seconds: float) -> None:
        commands.append(command)
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 0, f"{command}\n{result.output}"

    monkeypatch.setattr(f_study, "run_tsdkd", run_in_process)
    teacher = save_tiny_model(tmp_path / "teacher", seed=1, layers=3)
    rows = [{"messages": [{"role": "user", "content": f"What is {i} plus {i}?"}]} for i in range(12)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    data = write_rows(tmp_path / "data")
    words = ["--prompts", f"{tmp_path}/prompts.parquet", "--data", str(data), "--teacher", str(teacher)]
    return [*words, "--work", f"{tmp_path}/work", "--out", f"{tmp_path}/out", "--seconds", "900"], commands


def test_the_study_evaluates_every_round_and_goes_on_where_it_stopped(
    study: tuple[list[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, commands = study
    trains: list[str] = []
    whole = f_study.run_tsdkd

    def stopped_at_the_second_arm(command: str, log: Path, seconds: float) -> None:
        if command.startswith("train") and "TSD-KD" in command:
            trains.append(command)
            if len(trains) == 1:
                raise OutOfTimeError
        whole(command, log, seconds)

    monkeypatch.setattr(f_study, "run_tsdkd", stopped_at_the_second_arm)
    assert main_of("f_study", *words) == 1
    first = json.loads((tmp_path / "out" / "f_study.json").read_text())
    assert set(first["figures"]) >= {"teacher", "pruned", "start", "GKD, 5e-06, seed 0, round 1"}
    assert "TSD-KD, 5e-06, seed 0, round 1" not in first["figures"]
    assert not first["failed"]

    assert main_of("f_study", *words) == 0
    figures = json.loads((tmp_path / "out" / "f_study.json").read_text())["figures"]
    assert list(figures)[:3] == ["teacher", "pruned", "start"]
    assert len(figures) == 3 + 2 * 2
    assert len(commands) == len(set(commands)), "a complete command ran again"
    later = figures["TSD-KD, 5e-06, seed 0, round 2"]
    assert later.keys() >= {"gsm8k", "gsm8k s.e.", "sciq", "kl", "top1_agreement", "entropy", "minutes"}
    assert len(later["sciq documents"]) == f_study.TINY.evaluate.count("--limit 2") * 2
    samples = [command for command in commands if command.startswith("generate --run") and "--seed" in command]
    assert len(samples) == 1 + 2, "the first round's rollouts are sampled once, later ones for each arm"
    work = tmp_path / "work"
    assert not (work / "GKD-5e-06-seed-0-round-2" / "scores").exists()
    assert (work / "seed-0" / "scores").exists()


def test_the_queue_of_the_study_is_ordered_by_worth() -> None:
    runs = list(f_study.queue(f_study.Scale()))
    assert [run.arm for run in runs[:5]] == list(f_study.ARMS)
    assert {(run.rate, run.seed) for run in runs[:15]} == {(5e-6, 0)}
    assert len({run.slug for run in runs}) == len(runs)


def test_a_command_of_the_study_reports_its_failure_and_saves_its_work_when_the_time_is_over(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    f_study.run_tsdkd("--help", log, 60)
    assert "generate" in log.read_text()
    with pytest.raises(RuntimeError, match=r"(?s)artifact show nowhere: exit code 2.*nowhere"):
        f_study.run_tsdkd("artifact show nowhere", log, 60)
    with pytest.raises(OutOfTimeError):
        f_study.run_tsdkd("--help", log, 0)


def drive(out: Path, scripts: dict[str, str], longest: int = 200, **fakes: str) -> list[str]:
    """The words of a driver whose scripts are fakes."""
    for name, body in fakes.items():
        (out / f"{name}.py").write_text(f"NAME = {name!r}\n{FAKE}\n{body}\nfigures.finish([])\n")
    settings = f"run.SCRIPTS, run.GRACE, run.LEAST, run.LONGEST = {scripts}, 1, 1, {longest}"
    code = f"from benchmarks.gpu import run; {settings}; run.main()"
    return [sys.executable, "-c", code, "--tiny", "--out", str(out / "figures"), "--seconds", "300"]


def environment(out: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{out}"}


def measured(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / "figures" / f"{name}.json").read_text())


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_killed_driver_loses_the_figure_in_progress_alone(tmp_path: Path) -> None:
    """SIGKILL ends its script too; the next start measures what is missing, though another driver starts as well."""
    body = """
for number in range(3):
    def work(number=number):
        if number == 1 and not (options.out / "again").exists():
            (options.out / "pid").write_text(str(os.getpid()))
            time.sleep(60)
        return value(number)
    figures.measure(f"figure {number}", work)
"""
    words, pid = drive(tmp_path, {"a": "x"}, x=body), tmp_path / "figures" / "pid"
    first = subprocess.Popen(words, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.DEVNULL)
    wait_for(lambda: pid.exists() and pid.read_text() != "")
    first.kill()
    first.wait()
    wait_for(lambda: not Path("/proc", pid.read_text(), "exe").exists())
    assert measured(tmp_path, "x")["figures"] == {"figure 0": {"value": 0}}
    (tmp_path / "figures" / "again").touch()
    both = [
        subprocess.Popen(words, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [driver.communicate()[0] for driver in both]
    assert [driver.returncode for driver in both] == [0, 0], outputs
    assert (tmp_path / "figures" / "log.txt").read_text().split() == ["x0", "x1", "x2"]
    assert all("x: complete" in output and "figure 2" in output for output in outputs)


def test_the_driver_says_why_it_begins_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.gpu.run", "--tiny", "--out", str(tmp_path), "--seconds", "20", "b"]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 1
    assert "b_objective: not started, fewer than 60 seconds are left" in shown.stdout


def test_the_driver_tells_complete_scripts_from_others_without_starting_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = {"whole": ["one"], "part": ["one", "two"]}
    for script, names in expected.items():
        figures = figures_in(tmp_path, script=script)
        figures.measure("one", lambda: {"value": 1.0})
        with pytest.raises(SystemExit):
            figures.finish(names)
    monkeypatch.setattr(run, "SCRIPTS", {name[0]: f"benchmarks.gpu.{name}" for name in (*expected, "empty")})
    for letters, code in (("w", 0), ("wpe", 1)):
        monkeypatch.setattr(sys, "argv", ["run", "--out", str(tmp_path), "--seconds", "0", *letters])
        with pytest.raises(SystemExit, match=str(code)):
            run.main()
    shown = capsys.readouterr().out
    assert shown.count("whole: complete") == 2
    assert shown.count("part: not started") == shown.count("empty: not started") == 1


def test_the_driver_goes_on_after_a_script_that_ends_hangs_or_loses_its_device(tmp_path: Path) -> None:
    lost = """
def lose():
    raise RuntimeError("an illegal memory access")
figures.measure("lost", lose, lambda: False)
figures.measure("next", lambda: value(1))
"""
    shown = subprocess.run(
        drive(
            tmp_path,
            {"a": "ends", "b": "hangs", "c": "lost", "d": "last"},
            longest=15,
            ends="figures.measure('first', lambda: value(1))\nos.abort()",
            hangs="time.sleep(60)",
            lost=lost,
            last="figures.measure('last', lambda: value(1))",
        ),
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    assert f"ends: incomplete (exit code {-signal.SIGABRT})" in shown
    assert "hangs: stopped, its time is over" in shown
    assert "last: complete" in shown
    assert measured(tmp_path, "ends")["figures"] == {"first": {"value": 1}}
    lost_figures = measured(tmp_path, "lost")
    assert lost_figures["figures"] == {"next": {"value": 1}}
    assert "illegal memory access" in lost_figures["failed"]["lost"]
    assert lost_figures["begun"] == {"lost": ATTEMPTS}


def figures_in(out: Path, seconds: float = 60, script: str = "x", columns: Sequence[str] = ("value",)) -> Figures:
    return Figures(script, "X", columns, Options(out, True, seconds, "cpu"), {"device": "none"})


def test_an_error_is_recorded_and_the_next_figure_begins(tmp_path: Path) -> None:
    figures = figures_in(tmp_path)
    figures.measure("broken", lambda: {"value": 1 / 0})
    figures.measure("whole", lambda: {"value": 2.0})
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["figures"] == {"whole": {"value": 2.0}}
    assert "ZeroDivisionError" in content["failed"]["broken"]
    with pytest.raises(SystemExit, match="1"):
        figures.finish(["broken", "whole"])


def test_a_difference_is_ok_within_its_bound_and_failed_beyond_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = figures_in(tmp_path, columns=("result", "difference", "bound"))
    for name, difference in {"equal": 0.001, "unequal": 0.2, "NaN": float("nan")}.items():
        figures.measure(name, lambda difference=difference: within(difference, 0.01))
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        figures.finish(["equal", "unequal", "NaN"])
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert rows == [["equal", "ok", "0.001", "0.01"], ["unequal", "FAILED", "", ""], ["NaN", "FAILED", "", ""]]
    assert "the difference is 0.2, the bound 0.01" in shown


def test_no_figure_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    figures = figures_in(tmp_path, seconds=-1)
    figures.measure("late", lambda: {"value": 1.0})
    assert not figures.values


def test_recorded_samples_do_not_depend_on_numbers_that_were_drawn_before(tmp_path: Path) -> None:
    """Rows of a script are compared with each other."""
    options = Options(tmp_path, True, 60, "cpu")
    one, two = (RandomSource(options, 50, 2, mixed=True) for _ in range(2))
    assert torch.equal(one.head.weight, two.head.weight)
    assert torch.equal(one.columns["hidden"], two.columns["hidden"])
    assert one.samples == two.samples


def test_figures_are_compared_with_targets() -> None:
    target = Target("seconds", lambda figures: figures["x"]["seconds"], 1.1)
    assert target.describe({"x": {"seconds": 1.05}}, tiny=False) == "seconds: 1.05, at most 1.1: met"
    assert target.describe({"x": {"seconds": 1.2}}, tiny=False).endswith("missed")
    assert "not compared" in target.describe({"x": {"seconds": 1.2}}, tiny=True)
    assert "not measured" in target.describe({}, tiny=False)
    assert "not measured" in target.describe({"x": {"seconds": float("nan")}}, tiny=False)


def test_the_roofline_counts_both_passes_and_the_traffic_between_the_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(b_objective, "peak_flops", lambda _: 800e12)
    monkeypatch.setattr(b_objective, "copy_bandwidth", lambda _: 3e12)
    sizes = Namespace(tokens=8192, vocab=151936, widths=(1536, 5120))
    figure = b_objective.roofline(sizes, Options(tmp_path, False, 60, "cpu"))
    logits = 8192 * 151936
    products = logits * (6 * 1536 + 2 * 5120 + 0.8 * 1536) / 800e12
    assert figure["seconds"] == pytest.approx(products + logits * 6.6 / 3e12)
    assert figure["times bare"] == pytest.approx(1.15, abs=0.01)


def test_a_row_that_does_not_fit_is_measured_at_fewer_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def large(x: Any) -> None:
        if len(x.student) > 256:
            raise torch.OutOfMemoryError
        (x.student @ x.student_weight.T).sum().backward()

    monkeypatch.setitem(b_objective.ROWS, "large", large)
    sizes = Namespace(tokens=1024, vocab=50, widths=(4, 4), device="cpu", dtype="float32")
    figure = b_objective.measure_what_fits("large", sizes, 1.0, Options(tmp_path, True, 60, "cpu"))
    assert figure["tokens"] == 256


def test_torch_cuda_is_called_in_one_module_by_names_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in GPU.glob("*.py"):
        names = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda"
        }
        assert not names or path.name == "device.py", path
        for name in names:
            monkeypatch.setattr(torch.cuda, name, lambda *_: 3e9)  # an AttributeError for a name that torch lacks
    device.synchronize("cuda")
    assert device.is_working("cuda")
    assert device.peak_above(lambda: None, "cuda") == 0
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        device.seconds_of(lambda: None, "cuda")


@pytest.mark.parametrize(("name", "dtype", "gigabytes"), [("1.5B", torch.float32, 6.2), ("14B", torch.bfloat16, 29.5)])
def test_models_of_full_size_lie_on_the_device_in_their_precision(
    name: str, dtype: torch.dtype, gigabytes: float, tmp_path: Path
) -> None:
    """PyTorch's device without memory stands for the GPU."""
    model = random_model(name, Options(tmp_path, False, 60, "meta"), dtype)
    tensors = [*model.model.parameters()]
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {("meta", dtype)}
    assert sum(tensor.nbytes for tensor in tensors) / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_training_settings_appear_with_their_options() -> None:
    assert "full, compiled, mixed lengths, padded" in d_training.ROWS
    assert all(
        set(d_training.SETTINGS[name]) <= set(d_training.TrainConfig.__dataclass_fields__) for name in d_training.ROWS
    )


def test_wheels_are_cut_and_joined_by_their_hash(tmp_path: Path) -> None:
    small, content = os.environ | {"LARGEST_KB": "9"}, os.urandom(10_001)

    def wheels(action: str) -> int:
        return subprocess.run(
            ["bash", GPU / "wheels.sh", action, tmp_path], env=small, capture_output=True, check=False
        ).returncode

    (tmp_path / "large.whl").write_bytes(content)
    (tmp_path / "small.whl").write_bytes(b"small")
    assert wheels("split") == 0
    pieces = sorted(tmp_path.glob("large.whl.part*"))
    assert len(pieces) == 2
    assert not (tmp_path / "large.whl").exists()
    whole = pieces[0].read_bytes()
    pieces[0].write_bytes(b"x" + whole[1:])
    assert wheels("join") == 1
    assert not (tmp_path / "large.whl").exists()
    pieces[0].write_bytes(whole)
    assert wheels("join") == 0
    assert (tmp_path / "large.whl").read_bytes() == content
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["large.whl", "small.whl"]


def test_the_driver_knows_every_script() -> None:
    assert {path.name[0]: f"benchmarks.gpu.{path.stem}" for path in sorted(GPU.glob("?_*.py"))} == run.SCRIPTS
    assert list(run.SCRIPTS) == list("abcdefg")
    assert run.default_letters([]) == list("abcdeg")
    assert run.default_letters(["--prompts"]) == list("abcdegf")
    assert DEVICE_LOST not in {0, 1, 2}
