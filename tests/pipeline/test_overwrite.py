"""Every stage: --overwrite leaves the old artifact when it fails, and writes what a new run writes when it ends."""

import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.helpers.prompts import write_prompts
from tests.helpers.training import CONFIG, cut
from tsdkd.artifacts import writer
from tsdkd.artifacts.locks import has_readers
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.artifacts.writer import Writer
from tsdkd.cli.eval import find_results
from tsdkd.errors import ArtifactError, InputError, TsdkdError
from tsdkd.stages import prune as prune_module
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.inspect import InspectConfig
from tsdkd.stages.config.prune import PruneConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig
from tsdkd.stages.eval import harness
from tsdkd.stages.eval.stage import evaluate
from tsdkd.stages.generate import sampling
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.inspect import stage as inspect_stage
from tsdkd.stages.inspect.stage import inspect_scores
from tsdkd.stages.prune import prune
from tsdkd.stages.report import stage as report_stage
from tsdkd.stages.report.stage import report
from tsdkd.stages.score.stage import score
from tsdkd.stages.train import loop
from tsdkd.stages.train.stage import train_offline, train_online
from tsdkd.stages.train.trainer import DistillationTrainer

Contents = Callable[[Path], dict[str, bytes]]
KINDS = ("rollouts", "scores", "checkpoint", "results/m", "pruned")
ONLINE = replace(
    CONFIG, epochs=1, online=OnlineConfig(sampling=GenerateConfig(max_new_tokens=2, engine="transformers"))
)
NO_SPACE = namedtuple("usage", "total used free")(1, 1, 0)


@pytest.fixture(scope="module")
def finished(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    write_prompts(directory / "prompts.jsonl", 8)
    for kind in KINDS:
        make(kind, directory, student, teacher)
    return directory


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A complete run, with an artifact of each kind."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def make(kind: str, run: Path, student: Path, teacher: Path, *, changed: bool = False, **more: object) -> Artifact:
    """Make an artifact of a run; `changed`: with another setting."""
    models = str(student), str(teacher)
    if kind == "rollouts":
        config = GenerateConfig(max_new_tokens=8, part_size=4, temperature=0.5 if changed else 1.0)
        return generate(run / "prompts.jsonl", models[0], run / kind, config, **more)
    if kind == "scores":
        return score(run / "rollouts", *models, run / kind, ScoreConfig(k=5 if changed else 4), **more)
    if kind == "checkpoint":
        config = replace(CONFIG, epochs=1, save_steps=1, learning_rate=1e-4 if changed else 1e-3)
        return train_offline(run / "rollouts", run / "scores", models[0], run / kind, config, **more)
    if kind == "pruned":
        config = PruneConfig(drop=2 if changed else 1, limit=2, dtype="float32")
        return prune(models[1], run / "prompts.jsonl", run / kind, config, **more)
    return evaluate(models[0], run / kind, EvalConfig(("embedded",), limit=5 if changed else 4), **more)


def break_stage(kind: str, monkeypatch: pytest.MonkeyPatch) -> type[BaseException]:
    """Make a stage fail after its artifact is open, and before its first part. Returns the error."""
    failure = Mock(side_effect=TsdkdError("A cause.", "A remedy."))
    if kind == "scores":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: NO_SPACE)
    else:
        target, name = {
            "rollouts": (sampling, "open_engine"),
            "checkpoint": (loop, "_require_memory"),
            "results/m": (harness, "load_tasks"),
            "pruned": (prune_module, "_drop_layers"),
        }[kind]
        monkeypatch.setattr(target, name, failure)
    return TsdkdError


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_run_with_overwrite_leaves_the_old_artifact(
    run: Path, student: Path, teacher: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    before = contents(run)
    with monkeypatch.context() as patch, pytest.raises(break_stage(kind, patch)):
        make(kind, run, student, teacher, changed=True, overwrite=True)
    assert contents(run) == before
    make(kind, run, student, teacher, changed=True, overwrite=True)
    (run / kind).rename(run / "replaced")
    new = make(kind, run, student, teacher, changed=True)
    assert contents(run / "replaced").keys() == contents(run / kind).keys()
    assert load_manifest(run / "replaced") == new.manifest


@pytest.mark.parametrize("change", [{"lora": LoRAConfig(targets="q_prj")}, {"attention": "nonsense"}])
def test_training_options_that_do_not_fit_the_model_keep_the_old_checkpoint(
    run: Path, student: Path, contents: Contents, change: dict[str, object]
) -> None:
    before = contents(run)
    config = replace(CONFIG, epochs=1, **change)
    with pytest.raises(InputError):
        train_offline(run / "rollouts", run / "scores", str(student), run / "checkpoint", config, overwrite=True)
    assert contents(run) == before


def test_interrupted_training_with_overwrite_resumes_in_its_pending_directory(
    run: Path, student: Path, teacher: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run / "checkpoint")
    make("checkpoint", run, student, teacher, changed=True, overwrite=True)
    whole = contents(run / "checkpoint")
    make("checkpoint", run, student, teacher, overwrite=True)
    assert contents(run / "checkpoint") == before
    with monkeypatch.context() as patch:
        cut(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            make("checkpoint", run, student, teacher, changed=True, overwrite=True)
    assert contents(run / "checkpoint") == before
    resumed = list((run / ".checkpoint.tsdkd-new" / "resume").glob("checkpoint-*"))
    assert [step.name for step in resumed] == ["checkpoint-1"]
    assert read_artifact(run / "checkpoint", "checkpoint").manifest.state == "complete"
    report([run])  # and no other artifact appears in it
    make("checkpoint", run, student, teacher, changed=True)
    assert contents(run / "checkpoint") == whole
    assert [path.name for path in run.glob(".*")] == []


def test_results_stay_complete_while_a_benchmark_is_added(
    run: Path, student: Path, rows: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A benchmark that fails to load, and one that fails as it runs, leave results that can be compared."""
    before = contents(run / "results")
    config = EvalConfig(("embedded", "sciq"), limit=4)
    for name, error in (("load_tasks", OSError("The hub is unreachable.")), ("run_benchmark", KeyboardInterrupt())):
        with monkeypatch.context() as patch:
            patch.setattr(harness, name, Mock(side_effect=error))
            with pytest.raises(type(error)):
                evaluate(str(student), run / "results" / "m", config, rows)
        assert contents(run / "results") == before
        assert list(find_results([run])) == ["m"]
    extended = evaluate(str(student), run / "results" / "m", config, rows)
    whole = evaluate(str(student), run / "results" / "n", config, rows)
    assert extended.manifest == whole.manifest
    assert sorted(extended.manifest.summary) == ["embedded", "sciq"]


def test_an_interrupted_extension_keeps_its_complete_benchmarks(
    run: Path, student: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = harness.run_benchmark

    def interrupted(model: object, name: str, benchmark: object, *more: object) -> object:
        if benchmark.name == "sciq":
            raise KeyboardInterrupt
        return real(model, name, benchmark, *more)

    config = EvalConfig(("embedded", "sciq", "gsm8k"), limit=4, max_new_tokens=8)
    evaluate(str(student), run / "results" / "m", replace(config, tasks=("embedded",)), overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(harness, "run_benchmark", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(str(student), run / "results" / "m", config, rows)
    assert sorted(read_artifact(run / "results" / "m", "results").manifest.summary) == ["embedded"]
    assert list(find_results([run])) == ["m"]
    monkeypatch.setattr(harness, "run_benchmark", Mock(side_effect=AssertionError("gsm8k is complete")))
    extended = evaluate(str(student), run / "results" / "m", replace(config, tasks=("gsm8k",)), rows)
    assert sorted(extended.manifest.summary) == ["embedded", "gsm8k"]


def test_the_scores_cannot_be_replaced_while_training_reads_them(
    run: Path, student: Path, teacher: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of another teacher would change the teacher in mid-run; the manifest would name the first one."""
    compute_loss, refused = DistillationTrainer.compute_loss, []

    def replace_the_inputs(self: DistillationTrainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step == 1 and not refused:
            for kind in ("rollouts", "scores"):
                with monkeypatch.context() as patch:
                    patch.setattr(writer, "without_readers", lambda _: pytest.fail("the replacement waits for its end"))
                    with pytest.raises(ArtifactError, match="is being read by another process"):
                        make(kind, run, student, teacher, changed=True, overwrite=True)
                refused.append(kind)
            make("scores", run, student, teacher)  # nothing to do
        return compute_loss(self, *args, **kwargs)

    before = contents(run / "scores")
    monkeypatch.setattr(DistillationTrainer, "compute_loss", replace_the_inputs)
    make("checkpoint", run, student, teacher, changed=True, overwrite=True)
    assert refused == ["rollouts", "scores"]
    assert contents(run / "scores") == before
    make("scores", run, student, teacher, changed=True, overwrite=True)


STAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "generate": (
        lambda run: generate(
            run / "prompts.jsonl", str(run / "checkpoint"), run / "new", GenerateConfig(max_new_tokens=2)
        ),
        ("checkpoint",),
    ),
    "score": (
        lambda run: score(
            run / "rollouts", str(run / "checkpoint"), str(run / "pruned"), run / "new", ScoreConfig(k=4)
        ),
        ("rollouts", "checkpoint", "pruned"),
    ),
    "train offline": (
        lambda run: train_offline(
            run / "rollouts", run / "scores", str(run / "checkpoint"), run / "new", replace(CONFIG, epochs=1)
        ),
        ("rollouts", "scores", "checkpoint"),
    ),
    "train online": (
        lambda run: train_online(run / "rollouts", str(run / "checkpoint"), str(run / "pruned"), run / "new", ONLINE),
        ("rollouts", "checkpoint", "pruned"),
    ),
    "eval": (
        lambda run: evaluate(str(run / "checkpoint"), run / "new", EvalConfig(("embedded",), limit=1), held_out=run),
        ("checkpoint", "rollouts", "scores"),
    ),
    "prune": (
        lambda run: prune(str(run / "pruned"), run / "prompts.jsonl", run / "new", PruneConfig(drop=1, limit=1)),
        ("pruned",),
    ),
    "inspect": (
        lambda run: inspect_scores(run / "scores", InspectConfig(), after=str(run / "checkpoint")),
        ("rollouts", "scores", "checkpoint"),
    ),
    "report": (lambda run: report([run]), ("rollouts", "scores", "checkpoint", "results/m", "pruned")),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_locks_its_inputs_until_it_ends(run: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    work, inputs = STAGES[stage]
    held: list[bool] = []

    def looking(real: Callable[..., object]) -> Callable[..., object]:
        def look(*args: object, **kwargs: object) -> object:
            held.extend(has_readers(run / kind) for kind in inputs)
            return real(*args, **kwargs)

        return look

    for owner, name in ((Writer, "finish"), (inspect_stage, "build_response"), (report_stage, "render")):
        monkeypatch.setattr(owner, name, looking(getattr(owner, name)))
    work(run)
    assert held == [True] * len(inputs)
    assert not any(has_readers(run / kind) for kind in inputs)
