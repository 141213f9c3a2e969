"""tsdkd report on the command line: journals that commands leave, the page's path, and what is refused."""

import json
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from tests.helpers.commands import refuse
from tests.helpers.prompts import write_prompts
from tests.helpers.runs import STUDENT, TEACHER, checkpoint, rollouts, scores
from tsdkd.artifacts.journal import read_sessions
from tsdkd.artifacts.manifest import Manifest, Parent
from tsdkd.cli import app
from tsdkd.cli.console import command_line
from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.prune import PruneConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig, ReplayConfig, TrainConfig
from tsdkd.stages.methods import find_method
from tsdkd.stages.report.commands import rebuild_command
from tsdkd.stages.report.runs import Run, RunArtifact


def test_stages_leave_journals_and_the_last_line_is_the_page(
    student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 4)
    directory = str(tmp_path / "run")
    commands = [
        ["generate", "--run", directory, "--student", str(student), "--prompts", str(prompts), "--max-new-tokens", "4"],
        ["score", "--run", directory, "--teacher", str(teacher), "--k", "4"],
    ]
    for command in [*commands, commands[0]]:  # the third finds nothing to do
        monkeypatch.setattr(sys, "argv", ["tsdkd", *command])
        assert CliRunner().invoke(app, command).exit_code == 0
    for kind, command in zip(("rollouts", "scores"), commands, strict=True):
        (session,) = read_sessions(tmp_path / "run" / kind)
        assert (session.command, session.exit) == (shlex.join(["tsdkd", *command]), "finished")
    monkeypatch.setattr(
        "tsdkd.stages.report.stage.render", lambda *_, **values: values["runs"][0]["recorded_commands"][1]
    )
    shown = CliRunner().invoke(app, ["report", directory])
    assert shown.stdout.splitlines()[-1] == f"{directory}/report.html"
    assert (tmp_path / "run" / "report.html").read_text() == shlex.join(["tsdkd", *commands[1]])


def test_a_run_that_the_environment_names_is_part_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSDKD_RUN", "runs/my run")
    monkeypatch.setattr(sys, "argv", ["/somewhere/__main__.py", "score", "--k", "4"])
    assert command_line() == "TSDKD_RUN='runs/my run' tsdkd score --k 4"
    monkeypatch.setattr(sys, "argv", ["/somewhere/__main__.py", "score", "--run=runs/b"])
    assert command_line() == "tsdkd score --run=runs/b"


def test_wrong_directories_and_pages_are_refused(tmp_path: Path) -> None:
    cause, remedy = refuse("report", tmp_path / "none")
    assert "does not exist" in cause
    assert "tsdkd generate" in remedy
    assert "holds no artifact" in refuse("report", tmp_path)[0]
    rollouts(tmp_path / "run")
    cause, remedy = refuse("report", tmp_path / "run" / "rollouts")
    assert "is an artifact, not a run" in cause
    assert str(tmp_path / "run") in remedy
    assert "named twice" in refuse("report", tmp_path / "run", tmp_path / "run")[0]
    assert "does not name a page" in refuse("report", tmp_path / "run", "--html", tmp_path)[0]
    (tmp_path / "run" / "rollouts" / "manifest.json").write_text("{")
    assert "cannot be read" in refuse("report", tmp_path / "run")[0]
    assert not (tmp_path / "run" / "report.html").exists()


GENERATE = GenerateConfig(
    policy="mixed",
    student_fraction=0.3,
    temperature=0.5,
    top_p=0.9,
    max_new_tokens=7,
    rollout_tokens=5,
    stop=("\n\n", "one, two"),
    limit=3,
    column="q",
    system="Be kind; it's free.",
    engine="transformers",
    batch_size=5,
    part_size=6,
)
TRAIN = TrainConfig(
    objective=TSDKDConfig(alpha=0.2, gate=False, opener="adaptive", direct_weight=10.0),
    learning_rate=3e-5,
    epochs=1.5,
    batch_size=4,
    precision="float32",
    held_out=0.1,
    eval_steps=2,
    compile=True,
)
ONLINE = TrainConfig(
    online=OnlineConfig(
        student_fraction=0.4,
        sampling=GenerateConfig(temperature=0.7, batch_size=3, max_new_tokens=9, engine="transformers", stop=("a,b",)),
        teacher_dtype="float32",
    ),
    lora=LoRAConfig(rank=4, alpha=9, dropout=0.1, targets="q_proj", merge=True),
)
BASELINE = TrainConfig(
    method="skew-kl", objective=replace(find_method("skew-kl").objective, skew=0.2, temperature=2.0), learning_rate=1e-5
)
RELEASED = TrainConfig(objective=TSDKDConfig(k=7, released=("opener", "entropy")))
SEQKD = TrainConfig(method="seqkd", objective=find_method("seqkd").objective)
DISTILLM = TrainConfig(
    method="distillm",
    objective=find_method("distillm").objective,
    online=OnlineConfig(
        student_fraction=0.0, sampling=GenerateConfig(engine="transformers"), replay=ReplayConfig(phi=0.3)
    ),
    held_out=0.1,
    eval_steps=2,
)
MIXTURE = GenerateConfig(policy="teacher-mixed", teacher_fraction=0.4, engine="transformers", part_size=6)
MINILLM = TrainConfig(
    method="minillm",
    objective=find_method("minillm").objective,
    online=OnlineConfig(sampling=GenerateConfig(policy="teacher-mixed", teacher_fraction=0.4, engine="transformers")),
)
MINILLM_STUDENT = replace(MINILLM, online=OnlineConfig(sampling=GenerateConfig(engine="vllm")))
CONFIGS = {
    "mixture": (MIXTURE, "rollouts", "tsdkd.stages.generate.stage.generate"),
    "minillm": (MINILLM, "checkpoint", "tsdkd.stages.train.stage.train_online"),
    "minillm-student": (MINILLM_STUDENT, "checkpoint", "tsdkd.stages.train.stage.train_online"),
    "generate": (GENERATE, "rollouts", "tsdkd.stages.generate.stage.generate"),
    "score": (ScoreConfig(signal="topk", k=7, top_k=9), "scores", "tsdkd.stages.score.stage.score"),
    "train": (TRAIN, "checkpoint", "tsdkd.stages.train.stage.train_offline"),
    "online": (ONLINE, "checkpoint", "tsdkd.stages.train.stage.train_online"),
    "baseline": (BASELINE, "checkpoint", "tsdkd.stages.train.stage.train_offline"),
    "released": (RELEASED, "checkpoint", "tsdkd.stages.train.stage.train_offline"),
    "seqkd": (SEQKD, "checkpoint", "tsdkd.stages.train.stage.train_offline"),
    "distillm": (DISTILLM, "checkpoint", "tsdkd.stages.train.stage.train_online"),
    "prune": (PruneConfig(drop=2, limit=3), "checkpoint", "tsdkd.stages.prune.prune"),
    "eval": (
        EvalConfig(tasks=("gsm8k",), limit=9, chat_template=False),
        "results",
        "tsdkd.stages.eval.stage.evaluate",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rebuilt_command_passes_the_recorded_configuration(name: str, tmp_path: Path, student: Path) -> None:
    """The command line parses the command, and the stage receives the configuration."""
    config, kind, stage = CONFIGS[name]
    rollouts(tmp_path)
    scores(tmp_path)
    checkpoint(tmp_path, 0, [])
    prompts = Parent("prompts", "f", "../prompts.jsonl")
    parents = (
        (prompts,) if name in {"generate", "mixture", "prune", "eval"} else (Parent("rollouts", "f", "../rollouts"),)
    )
    models = {"prune": (TEACHER,), "eval": (STUDENT,)}.get(name, (STUDENT, TEACHER))
    models = tuple(type(m)("evaluated", str(student), "w", "t", "c") for m in models) if name == "eval" else models
    recorded = as_recorded(config)
    path = tmp_path / ("results/student" if name == "eval" else "pruned" if name == "prune" else kind)
    artifact = RunArtifact(str(path), path, Manifest(kind, recorded, 5, parents, models), (), False, 0)
    words = shlex.split(rebuild_command(Run("run", tmp_path, (artifact,)), artifact))
    with patch(stage, side_effect=Stopped) as called:
        CliRunner().invoke(app, words[1:])
    passed = [*called.call_args.args, *called.call_args.kwargs.values()]
    (received,) = [value for value in passed if isinstance(value, type(config))]
    assert as_recorded(received) == recorded
    if name not in {"score", "prune", "eval"}:
        assert 5 in passed
    assert str(path) in map(str, passed)


def as_recorded(config: Any) -> dict[str, Any]:
    """A configuration as a manifest records it."""
    recorded: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return recorded


class Stopped(Exception):  # noqa: N818
    """The stage was reached."""
