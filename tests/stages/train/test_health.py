"""A run that degenerates warns once of each sign; it can be stopped, and keeps its best or last saved step."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.training import CONFIG, learn, metrics, weights
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.metrics.health import HealthMonitor, Sign, WeightMonitor, is_repeating, response_health
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.train import callbacks, resume
from tsdkd.stages.train.trainer import DistillationTrainer

HEALTHY = {"student_entropy": 2.0, "response_length": 100.0, "repeating": 0.1}


class RecordingObserver(SilentObserver):
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.logged: list[dict[str, float]] = []
        self.tables: list[str] = []

    def info(self, message: str) -> None:
        self.messages.append(message)

    def metrics(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        self.tables.append(title)


def test_repetition_is_counted_in_four_grams() -> None:
    assert is_repeating([1, 2] * 10)  # 17 four-grams, 2 of them new
    assert not is_repeating(list(range(20)))
    assert not is_repeating([1, 2, 3] * 2)  # 3 four-grams, all new
    assert is_repeating([5] * 6)
    assert not is_repeating([5])
    found = response_health(
        [{"finish_reason": "length", "response_ids": [5] * 9}, {"finish_reason": "stop", "response_ids": [1, 2]}]
    )
    assert found == {"truncated": 0.5, "repeating": 0.5}


@pytest.mark.parametrize(
    ("name", "value", "bad"),
    [
        ("student_entropy", 0.41, False),
        ("student_entropy", 0.39, True),
        ("response_length", 19, True),
        ("repeating", 0.45, False),
        ("repeating", 0.6, True),
    ],
)
def test_signs(name: str, value: float, bad: bool) -> None:
    monitor = HealthMonitor()
    for _ in range(5):
        assert monitor.update(HEALTHY) == []
    found = [monitor.update(HEALTHY | {name: value}) for _ in range(6)]
    assert found[0] == []  # one step is no degeneration
    assert [sign.metric for sign in found[-1]] == ([name] if bad else [])
    assert sum(sign.is_new for signs in found for sign in signs) == bad


def test_the_first_step_without_any_weight_is_warned_of_once() -> None:
    """One loss has weights in the first step, none has any in the next two; the run is resumed after the second."""
    entries = [{"loss": 1.0, "a_selected": a, "b_selected": 0.0} for a in (0.5, 0.0, 0.0)]
    for resumed in (0, 2):
        observer, state = RecordingObserver(), SimpleNamespace(global_step=2, log_history=entries[:resumed])
        callback = callbacks.HealthCallback(observer, stop=False)
        callback.on_train_begin(None, state, None)
        for entry in entries[resumed:]:
            callback.on_log(None, state, None, entry)
        callback.on_train_end(None, state, None)
        expected = ["At step 2 no token has a weight in any loss: the step has no gradient."]
        assert observer.messages == ([] if resumed else expected)
    monitor = WeightMonitor()
    assert not monitor.update({"loss": 1.0})  # of a method without losses of its own
    assert not monitor.found_none


@pytest.fixture
def degenerating(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run degenerates from step 4 on."""

    def update(self: HealthMonitor, step: dict[str, float]) -> list[Sign]:
        self.first.append(step)
        count = len(self.first)
        return [Sign("student_entropy", "its entropy is gone", count == 4)] if count >= 4 else []

    monkeypatch.setattr(HealthMonitor, "update", update)


def test_a_resumed_run_shows_its_metrics_from_the_beginning() -> None:
    history = [{"loss": 2.0, "step": 1}, {"eval_kl": 0.5, "step": 1}, {"loss": 1.0, "gate": 0.3, "step": 2}]
    observer, state = RecordingObserver(), SimpleNamespace(max_steps=4, global_step=2, log_history=history)
    with ExitStack() as stack:
        callbacks.ProgressCallback(observer, stack).on_train_begin(None, state, None)
    assert observer.logged == [{"loss": 2.0}, {"held-out KL": 0.5}, {"loss": 1.0}]


def test_a_degenerate_run_is_warned_of_once(
    run: Path,
    student: Path,
    tmp_path: Path,
    degenerating: None,
) -> None:
    observer = RecordingObserver()
    learn(run, student, tmp_path / "c", observer=observer)
    assert [line for line in observer.messages if "degenerates" in line] == [
        "The run degenerates at step 4: its entropy is gone."
    ]
    assert len(metrics(tmp_path / "c")) == 6


def test_a_resumed_run_does_not_repeat_a_warning(degenerating: None) -> None:
    observer, state = (
        RecordingObserver(),
        SimpleNamespace(global_step=6, log_history=[{"loss": 1.0, "step": i} for i in range(1, 6)]),
    )
    callback = callbacks.HealthCallback(observer, stop=False)
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, {"loss": 1.0})
    assert observer.messages == []


def test_a_stopped_run_ends_with_its_last_saved_step(
    run: Path,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    degenerating: None,
) -> None:
    """Every second step is saved: the checkpoint has the weights of step 2."""
    saved = {}
    on_save = resume.StateCallback.on_save

    def remember(
        self: object, args: object, state: object, control: object, model: torch.nn.Module, **_: object
    ) -> None:
        saved[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}
        on_save(self, args, state, control)

    monkeypatch.setattr(resume.StateCallback, "on_save", remember)
    checkpoint = learn(run, student, tmp_path / "c", replace(CONFIG, stop_on_degeneration=True))
    assert saved.keys() == {2}
    assert all(torch.equal(checkpoint[name], saved[2][name]) for name in checkpoint)
    assert not torch.equal(checkpoint["lm_head.weight"], weights(student)["lm_head.weight"])
    assert len(metrics(tmp_path / "c")) == 2
    assert load_manifest(tmp_path / "c").summary["degenerated_at"] == 4


def test_degeneration_before_a_saved_step_is_an_error(
    run: Path,
    student: Path,
    tmp_path: Path,
    degenerating: None,
) -> None:
    with pytest.raises(TsdkdError, match="degenerated at step 4, before a step was saved"):
        learn(run, student, tmp_path / "c", replace(CONFIG, stop_on_degeneration=True, save_steps=50))


def test_the_checkpoint_is_the_best_measured_step(
    run: Path,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The divergence on held-out prompts is set to be lowest after the second step."""
    states, observer = [], RecordingObserver()
    evaluate = DistillationTrainer.evaluate

    def evaluated(self: DistillationTrainer, *given: object, **more: object) -> dict[str, float]:
        states.append({name: value.clone() for name, value in self.student.model.state_dict().items()})
        return evaluate(self, *given, **more) | {"eval_kl": [3.0, 1.0, 2.0][min(len(states) - 1, 2)]}

    monkeypatch.setattr(DistillationTrainer, "evaluate", evaluated)
    config = replace(CONFIG, held_out=0.4, eval_steps=1, batch_size=2, learning_rate=1e-2)
    checkpoint = learn(run, student, tmp_path / "c", config, observer=observer)
    assert all(torch.equal(checkpoint[name], states[1][name]) for name in checkpoint)
    assert not torch.equal(checkpoint["lm_head.weight"], states[-1]["lm_head.weight"])
    summary = load_manifest(tmp_path / "c").summary
    assert (summary["best_step"], summary["best_kl"]) == (2, 1.0)
    assert sum("held-out top-1 agreement" in line for line in observer.messages) == len(states) > 2


def test_a_stopped_run_that_was_measured_keeps_its_best_step(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, degenerating: None
) -> None:
    """Steps 1 to 3 are measured, the second is best; step 4 ends the run."""
    states: list[dict[str, torch.Tensor]] = []
    evaluate = DistillationTrainer.evaluate

    def evaluated(self: DistillationTrainer, *given: object, **more: object) -> dict[str, float]:
        states.append({name: value.clone() for name, value in self.student.model.state_dict().items()})
        return evaluate(self, *given, **more) | {"eval_kl": [3.0, 1.0, 2.0, 2.0][len(states) - 1]}

    monkeypatch.setattr(DistillationTrainer, "evaluate", evaluated)
    config = replace(CONFIG, held_out=0.4, eval_steps=1, batch_size=2, epochs=3, learning_rate=1e-2)
    checkpoint = learn(run, student, tmp_path / "c", replace(config, stop_on_degeneration=True))
    assert len(states) == 3
    assert all(torch.equal(checkpoint[name], states[1][name]) for name in checkpoint)
    assert load_manifest(tmp_path / "c").summary["best_step"] == 2


def test_held_out_prompts_are_measured_and_not_trained_on(
    run: Path,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained: set[str] = set()
    compute_loss = DistillationTrainer.compute_loss

    def spy(self: DistillationTrainer, model: object, inputs: dict, *more: object, **named: object) -> object:
        trained.update(sample["sample_id"] for sample in inputs["samples"])
        return compute_loss(self, model, inputs, *more, **named)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", spy)
    trainers: list[DistillationTrainer] = []
    evaluate = DistillationTrainer.evaluate
    monkeypatch.setattr(
        DistillationTrainer, "evaluate", lambda self, *a, **k: (trainers.append(self), evaluate(self, *a, **k))[1]
    )
    learn(run, student, tmp_path / "c", replace(CONFIG, held_out=0.4, eval_steps=2, epochs=1))
    held_out = trainers[0].held_out
    measured = {held_out.source[i]["sample_id"] for i in held_out.indices}
    assert measured
    assert not measured & trained
    assert len(measured | trained) == 10
    steps = [step for step in metrics(tmp_path / "c") if "eval_kl" in step]
    assert steps
    assert all(step["eval_kl"] > 0 for step in steps)


def test_logs_are_written_at_every_step_and_reach_trackers(
    run: Path,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    lines: list[int] = []

    def count(self: RecordingObserver, values: dict[str, float]) -> None:
        lines.append(len((tmp_path / "c" / "resume" / "metrics.jsonl").read_text().splitlines()))

    monkeypatch.setattr(RecordingObserver, "metrics", count)
    learn(run, student, tmp_path / "c", replace(CONFIG, trackers=("tensorboard",)), observer=RecordingObserver())
    assert lines == sorted(lines)
    assert lines[-1] >= 5
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    found = [event.value for event in board.Scalars("train/direct")]
    assert found == pytest.approx([step["direct"] for step in metrics(tmp_path / "c")], rel=1e-5)


def test_the_model_card_has_models_settings_and_metrics(run: Path, student: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    learn(run, student, tmp_path / "c")
    card = ModelCard.load(tmp_path / "c" / "README.md")
    assert card.data.base_model is None  # the hub refuses a path
    assert str(student) in card.content
    assert card.data.library_name == "transformers"
    last = metrics(tmp_path / "c")[-1]
    assert f"| {last['loss']:.4g} |" in card.content
    assert "| objective.beta | 0.9 |" in card.content
    assert load_manifest(tmp_path / "c").parents[0].fingerprint[:16] in card.content


@contextmanager
def available_memory(monkeypatch: pytest.MonkeyPatch, available: int) -> object:
    from tsdkd.stages.models import device as module

    with monkeypatch.context() as patch:
        patch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
        yield


def test_too_little_memory(
    run: Path,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    observer, config = RecordingObserver(), TrainConfig(**CONFIG.__dict__)
    with available_memory(monkeypatch, 10_000), pytest.raises(InputError, match="for weights and optimizer alone"):
        learn(run, student, tmp_path / "c", config)
    assert not (tmp_path / "c").exists()
    with available_memory(monkeypatch, 2_000_000):
        learn(run, student, tmp_path / "c", config, observer=observer)
    assert observer.tables == ["Memory needed for training"]
    assert any("may not fit" in line and "--lora" in line for line in observer.messages)
