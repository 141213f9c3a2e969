"""Offline training: the update is the objective's, whatever the micro-batches, and the checkpoint is the model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import pad
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from tests.helpers.training import (
    CONFIG,
    OBJECTIVE,
    RecordingObserver,
    largest_change,
    learn,
    loss_of_two_models,
    metrics,
    same_update,
    weights,
)
from tsdkd.core import Head, TeacherHidden, token_selective_loss
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data import source
from tsdkd.stages.data.batches import join_sequences
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.score.stage import score
from tsdkd.stages.train import loop
from tsdkd.stages.train import trainer as trainer_module
from tsdkd.stages.train.stage import train_offline

Contents = Callable[[Path], dict[str, bytes]]


def test_the_first_step_is_the_objective_of_two_loaded_models(
    run: Path, student: Path, teacher: Path, tmp_path: Path
) -> None:
    """All ten responses in one batch; the expected loss comes from padded full logits of both models."""
    learn(run, student, tmp_path / "c", replace(CONFIG, batch_size=10, epochs=1))
    samples = OfflineSource(run / "rollouts", run / "scores")
    rows = [samples[i] for i in range(10)]
    loss, terms = loss_of_two_models(rows, student, teacher)
    (logged,) = metrics(tmp_path / "c")
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name in terms:
        assert logged[name] == pytest.approx(terms[name].item(), rel=1e-4, abs=1e-6), name


def test_fifty_steps_follow_the_reference(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference run forms all logits and differentiates by autograd."""
    config = replace(CONFIG, epochs=10, batch_size=2)
    learn(run, student, tmp_path / "chunked", config)

    def by_logits(
        hidden: torch.Tensor, head: Head, teacher: TeacherHidden, *more: object, **_: object
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return token_selective_loss(head.logits(hidden), teacher, *more)

    monkeypatch.setattr(trainer_module, "token_selective_loss_from_hidden", by_logits)
    learn(run, student, tmp_path / "reference", config)
    chunked, reference = metrics(tmp_path / "chunked"), metrics(tmp_path / "reference")
    assert len(chunked) == len(reference) == 50
    first, last = (sum(step["loss"] for step in epoch) for epoch in (chunked[:5], chunked[-5:]))
    assert last < 0.95 * first
    for step, expected in zip(chunked, reference, strict=True):
        shares = {f"{term}_grad_share" for term in ("indirect", "direct", "entropy")}
        assert step.keys() == expected.keys() | shares  # autograd has no gradient of each term
        assert {name: step[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_gradient_checkpointing_does_not_change_the_update(run: Path, student: Path, tmp_path: Path) -> None:
    plain = learn(run, student, tmp_path / "plain")
    again = learn(run, student, tmp_path / "again", replace(CONFIG, gradient_checkpointing=True))
    assert same_update(plain, again, weights(student))


@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_do_not_change_the_update(run: Path, student: Path, tmp_path: Path, micro: int) -> None:
    """Ten responses in batches of four: the last optimizer batch holds two responses and averages over these."""
    two = learn(run, student, tmp_path / "two")
    other = learn(run, student, tmp_path / "other", replace(CONFIG, micro_batch_size=micro))
    start = weights(student)
    assert same_update(two, other, start)
    for one, another in zip(metrics(tmp_path / "two"), metrics(tmp_path / "other"), strict=True):
        assert one == pytest.approx(another, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("sides", [(3, 0), (0, 2)])
def test_neither_order_nor_padding_change_the_update(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sides: tuple[int, int]
) -> None:
    """All responses in one optimizer batch, shuffled by two seeds; the second run pads further on one side."""
    config = replace(CONFIG, batch_size=10, micro_batch_size=5)
    expected = learn(run, student, tmp_path / "one", config)

    def wider(*sequences: list[Any], packed: bool) -> dict[str, torch.Tensor]:
        batch = join_sequences(*sequences, packed=packed)
        mask = batch.pop("response_mask")
        return {name: pad(value, sides) for name, value in batch.items()} | {"response_mask": pad(mask, (0, sides[1]))}

    monkeypatch.setattr(source, "join_sequences", wider)
    assert same_update(learn(run, student, tmp_path / "other", config, seed=1), expected, weights(student))


@pytest.mark.parametrize(("epochs", "warmup", "warned"), [(1, 0.1, True), (1, 0.0, False), (3, 0.1, False)])
def test_a_run_that_only_warms_up_gets_a_warning(
    run: Path, student: Path, tmp_path: Path, epochs: int, warmup: float, warned: bool
) -> None:
    observer = RecordingObserver()
    learn(
        run,
        student,
        tmp_path / "c",
        replace(CONFIG, batch_size=10, epochs=epochs, warmup_ratio=warmup),
        observer=observer,
    )
    assert warned == any("learning rate 0" in message for message in observer.warnings)


def test_transformers_loads_the_checkpoint(run: Path, student: Path, tmp_path: Path) -> None:
    found = learn(run, student, tmp_path / "c")
    assert largest_change(found, weights(student)) > 1e-4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert model.dtype == torch.float32
    assert model.config.vocab_size == AutoModelForCausalLM.from_pretrained(student).config.vocab_size
    saved, original = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "c", student))
    assert saved.get_vocab() == original.get_vocab()
    assert saved.chat_template == original.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "c").eos_token_id == original.eos_token_id
    assert not (tmp_path / "c" / "resume").exists()


def test_tied_embeddings_stay_tied_and_are_saved_once(run: Path, student: Path, tmp_path: Path) -> None:
    tied = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student, tie_word_embeddings=True))
    tied.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(student).save_pretrained(tmp_path / "tied")
    learn(run, tmp_path / "tied", tmp_path / "c", replace(CONFIG, epochs=1, precision="bfloat16"))
    names = [set(load_file(tmp_path / name / "model.safetensors")) for name in ("tied", "c")]
    assert names[0] == names[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert largest_change(model.state_dict(), tied.state_dict()) > 1e-4


def test_the_checkpoint_has_the_weights_that_the_forward_used(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bfloat16 forward uses rounded weights, and those of the last step are saved."""
    states: list[dict[str, torch.Tensor]] = []
    summary = loop.training_summary
    monkeypatch.setattr(
        loop,
        "training_summary",
        lambda trainer, *more: (states.append(trainer.model.state_dict()), summary(trainer, *more))[1],
    )
    learn(run, student, tmp_path / "c", replace(CONFIG, precision="bfloat16"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "c").state_dict()
    assert all(value.dtype == torch.bfloat16 for value in saved.values())
    assert all(torch.equal(saved[name], states[0][name].bfloat16()) for name in saved)
    assert any(not torch.equal(saved[name].float(), states[0][name]) for name in saved)


def test_the_student_comes_closer_to_its_teacher(run: Path, student: Path, tmp_path: Path) -> None:
    objective = replace(OBJECTIVE, alpha=0, em_weight=0, beta=0, gate=False)
    learn(run, student, tmp_path / "c", replace(CONFIG, objective=objective, epochs=12, learning_rate=5e-3))
    log = metrics(tmp_path / "c")
    assert log[-1]["direct"] < 0.7 * log[0]["direct"]


@pytest.mark.parametrize("signal_", ["hidden8", "topk", "ranks"])
def test_light_signals_train(run: Path, student: Path, teacher: Path, tmp_path: Path, signal_: str) -> None:
    score(run / "rollouts", str(student), str(teacher), tmp_path / "s", ScoreConfig(signal=signal_, k=4, top_k=8))
    objective = replace(OBJECTIVE, direct_weight=float(signal_ != "ranks"))
    train_offline(
        run / "rollouts", tmp_path / "s", str(student), tmp_path / "c", replace(CONFIG, objective=objective, epochs=1)
    )
    learn(run, student, tmp_path / "h", replace(CONFIG, objective=objective, epochs=1))
    assert largest_change(weights(tmp_path / "c"), weights(student)) > 1e-4
    light, exact = metrics(tmp_path / "c")[0], metrics(tmp_path / "h")[0]  # before the student has moved
    assert light["indirect"] == pytest.approx(exact["indirect"], rel=1e-2 if signal_ == "hidden8" else 1e-5)
    assert light["entropy"] == pytest.approx(exact["entropy"], rel=1e-5)
    if signal_ == "hidden8":
        assert light["direct"] == pytest.approx(exact["direct"], rel=1e-2)
    if signal_ == "topk":
        assert 0 < light["direct"] < exact["direct"]
