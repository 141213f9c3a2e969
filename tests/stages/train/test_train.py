"""train: the update is the objective's, whatever the micro-batches; a cut run ends where an uninterrupted one does."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import pad
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerControl,
    TrainerState,
)

from tests.helpers.training import (
    CONFIG,
    OBJECTIVE,
    Listening,
    apart,
    learn,
    loss_of_two_models,
    metrics,
    same_update,
    weights,
)
from tsdkd.core import Head, Sampled, TeacherHidden, TSDKDConfig, token_selective_loss
from tsdkd.errors import ArtifactError, InputError, TsdkdError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data import sources
from tsdkd.stages.data.batches import align_responses
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.score.stage import score
from tsdkd.stages.train import loop, settings
from tsdkd.stages.train import trainer as trainer_module
from tsdkd.stages.train.saved_steps import STATE_FILE, StateCallback, last_complete_step
from tsdkd.stages.train.stage import train_offline

Contents = Callable[[Path], dict[str, bytes]]


def test_the_first_step_is_the_objective_of_a_live_teacher(
    run: Path, student: Path, teacher: Path, tmp_path: Path
) -> None:
    """All ten responses in one batch; the loss by two live models and full logits, padded, in one piece."""
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
    """The same run with all logits formed and autograd for the gradients."""
    config = replace(CONFIG, epochs=10, batch_size=2)
    learn(run, student, tmp_path / "chunked", config)

    def by_logits(
        hidden: torch.Tensor, head: Head, teacher: TeacherHidden, *more: object, compiled: bool, sampled: Sampled
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return token_selective_loss(head.logits(hidden), teacher.formed(), *more)

    monkeypatch.setattr(trainer_module, "token_selective_loss_from_hidden", by_logits)
    learn(run, student, tmp_path / "reference", config)
    ours, theirs = metrics(tmp_path / "chunked"), metrics(tmp_path / "reference")
    assert len(ours) == len(theirs) == 50
    first, last = (sum(step["loss"] for step in epoch) for epoch in (ours[:5], ours[-5:]))
    assert last < 0.95 * first
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_gradient_checkpointing_does_not_change_the_update(run: Path, student: Path, tmp_path: Path) -> None:
    plain = learn(run, student, tmp_path / "plain")
    again = learn(run, student, tmp_path / "again", replace(CONFIG, gradient_checkpointing=True))
    assert same_update(plain, again, weights(student))


@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_do_not_change_the_update(run: Path, student: Path, tmp_path: Path, micro: int) -> None:
    """Ten responses in batches of four: the last optimizer batch holds two, and still averages over its own."""
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
    """All responses in one optimizer batch, shuffled by two seeds; the second time padded further to either side."""
    config = replace(CONFIG, batch_size=10, micro_batch_size=5)
    expected = learn(run, student, tmp_path / "one", config)

    def wider(prompts: list[list[int]], responses: list[list[int]]) -> tuple[torch.Tensor, ...]:
        ids, attention, mask = align_responses(prompts, responses)
        return pad(ids, sides), pad(attention, sides), pad(mask, (0, sides[1]))

    monkeypatch.setattr(sources, "align_responses", wider)
    assert same_update(learn(run, student, tmp_path / "other", config, seed=1), expected, weights(student))


@pytest.mark.parametrize("opener", [0.1, "adaptive"])
@pytest.mark.parametrize("cut_at", [0, 1, 3, 4, 5])
def test_a_cut_run_ends_with_the_same_bytes(
    run: Path,
    student: Path,
    tmp_path: Path,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
    cut_at: int,
    opener: float | str,
) -> None:
    """Cut inside any of the six steps, or while step 4 is being saved."""
    config = replace(CONFIG, objective=replace(OBJECTIVE, opener=opener))
    learn(run, student, tmp_path / "whole", config)
    compute_loss = trainer_module.DistillationTrainer.compute_loss

    def cut(self: object, *args: object, **kwargs: object) -> object:
        if self.state.global_step == cut_at:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.DistillationTrainer, "compute_loss", cut)
    with pytest.raises(KeyboardInterrupt):
        learn(run, student, tmp_path / "cut", config)
    monkeypatch.undo()
    if cut_at == 5:  # as if killed before the mark was written
        (tmp_path / "cut" / "resume" / "checkpoint-4" / STATE_FILE).unlink()
    learn(run, student, tmp_path / "cut", config)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_cut_run_is_not_continued_with_other_settings(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_loss = trainer_module.DistillationTrainer.compute_loss

    def cut(self: object, *args: object, **kwargs: object) -> object:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.DistillationTrainer, "compute_loss", cut)
    with pytest.raises(KeyboardInterrupt):
        learn(run, student, tmp_path / "cut")
    with pytest.raises(ArtifactError, match=r"learning_rate was 0.001, now 0.5"):
        learn(run, student, tmp_path / "cut", replace(CONFIG, learning_rate=0.5))


def test_ctrl_c_saves_the_step_and_the_next_run_continues(
    run: Path, student: Path, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, save_steps=100)
    learn(run, student, tmp_path / "whole", config)
    compute_loss = trainer_module.DistillationTrainer.compute_loss

    def interrupted(self: object, *args: object, **kwargs: object) -> object:
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.DistillationTrainer, "compute_loss", interrupted)
    told = Listening()
    with pytest.raises(KeyboardInterrupt):
        learn(run, student, tmp_path / "cut", config, observer=told)
    monkeypatch.undo()
    assert any(message.startswith("Interrupted: training stops once this step is saved") for message in told.said)
    assert (tmp_path / "cut" / "resume" / "checkpoint-3" / STATE_FILE).is_file()
    learn(run, student, tmp_path / "cut", config)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("epochs", "warmup", "warned"), [(1, 0.1, True), (1, 0.0, False), (3, 0.1, False)])
def test_a_run_whose_only_steps_warm_up_is_warned_of(
    run: Path, student: Path, tmp_path: Path, epochs: int, warmup: float, warned: bool
) -> None:
    told = Listening()
    learn(
        run, student, tmp_path / "c", replace(CONFIG, batch_size=10, epochs=epochs, warmup_ratio=warmup), observer=told
    )
    assert warned == any("learning rate 0" in message for message in told.warned)


@pytest.mark.parametrize("lost", ["optimizer.pt", "model.safetensors", "shards/0.distcp", STATE_FILE])
def test_a_saved_step_that_lacks_a_file_is_not_continued(tmp_path: Path, lost: str) -> None:
    for step in (2, 4):
        place = tmp_path / f"checkpoint-{step}"
        place.mkdir()
        for file in ("optimizer.pt", "model.safetensors"):
            (place / file).touch()
        (place / "shards").mkdir()  # as sharded states are saved
        (place / "shards" / "0.distcp").touch()
        state = TrainerState(global_step=step, is_world_process_zero=True)
        StateCallback({}).on_save(SimpleNamespace(output_dir=tmp_path), state, TrainerControl())
    assert last_complete_step(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-4" / lost).unlink()
    assert last_complete_step(tmp_path) == tmp_path / "checkpoint-2"
    assert not (tmp_path / "checkpoint-4").exists()


def test_experts_are_resumed(run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose files name its weights otherwise than the model in memory."""
    shape = AutoConfig.from_pretrained(student)
    torch.manual_seed(0)
    experts = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=shape.vocab_size,
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )
    experts.save_pretrained(tmp_path / "experts")
    AutoTokenizer.from_pretrained(student).save_pretrained(tmp_path / "experts")
    whole = learn(run, tmp_path / "experts", tmp_path / "whole")
    compute_loss = trainer_module.DistillationTrainer.compute_loss

    def cut(self: object, *given: object, **more: object) -> object:
        if self.state.global_step == 3:
            raise RuntimeError("cut")
        return compute_loss(self, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.DistillationTrainer, "compute_loss", cut)
        with pytest.raises(RuntimeError, match="cut"):
            learn(run, tmp_path / "experts", tmp_path / "cut")
    resumed = learn(run, tmp_path / "experts", tmp_path / "cut")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_the_checkpoint_loads_without_us(run: Path, student: Path, tmp_path: Path) -> None:
    found = learn(run, student, tmp_path / "c")
    assert apart(found, weights(student)) > 1e-4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert model.dtype == torch.float32
    assert model.config.vocab_size == AutoModelForCausalLM.from_pretrained(student).config.vocab_size
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "c", student))
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "c").eos_token_id == theirs.eos_token_id
    assert not (tmp_path / "c" / "resume").exists()


def test_tied_embeddings_stay_tied_and_are_saved_once(run: Path, student: Path, tmp_path: Path) -> None:
    tied = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student, tie_word_embeddings=True))
    tied.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(student).save_pretrained(tmp_path / "tied")
    learn(run, tmp_path / "tied", tmp_path / "c", replace(CONFIG, epochs=1, precision="bfloat16"))
    names = [set(load_file(tmp_path / place / "model.safetensors")) for place in ("tied", "c")]
    assert names[0] == names[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert apart(model.state_dict(), tied.state_dict()) > 1e-4


def test_the_checkpoint_is_the_model_that_the_forward_saw(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bf16 forward sees rounded weights, and those of the last step are saved."""
    held: list[dict[str, torch.Tensor]] = []
    summary = loop._summary
    monkeypatch.setattr(
        loop,
        "_summary",
        lambda trainer, *more: (held.append(trainer.model.state_dict()), summary(trainer, *more))[1],
    )
    learn(run, student, tmp_path / "c", replace(CONFIG, precision="bfloat16"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "c").state_dict()
    assert all(value.dtype == torch.bfloat16 for value in saved.values())
    assert all(torch.equal(saved[name], held[0][name].bfloat16()) for name in saved)
    assert any(not torch.equal(saved[name].float(), held[0][name]) for name in saved)


def test_the_student_comes_closer_to_its_teacher(run: Path, student: Path, tmp_path: Path) -> None:
    objective = replace(OBJECTIVE, alpha=0, em_weight=0, beta=0, gate=False)
    learn(run, student, tmp_path / "c", replace(CONFIG, objective=objective, epochs=12, learning_rate=5e-3))
    log = metrics(tmp_path / "c")
    assert log[-1]["direct"] < 0.7 * log[0]["direct"]


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(run: Path, student: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(student, broken)
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.lm_head.weight.data[3, 3] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(
        TsdkdError, match=r"loss is nan at step 1 \(indirect, direct, entropy\), samples [0-9a-f]+-0, [0-9a-f]+-0"
    ) as caught:
        learn(run, broken, tmp_path / "c")
    assert "--learning-rate" in caught.value.remedy
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("signal_", "objective", "cause"),
    [
        ("hidden", replace(OBJECTIVE, k=258), "allow only 257"),
        ("topk", replace(OBJECTIVE, k=5), "allow only 4"),
        ("topk", replace(OBJECTIVE, temperature=2.0), "hold at temperature 1"),
        ("ranks", OBJECTIVE, "no teacher distribution"),
    ],
)
def test_scores_that_cannot_serve_are_refused_before_anything_is_written(
    run: Path, student: Path, teacher: Path, tmp_path: Path, signal_: str, objective: TSDKDConfig, cause: str
) -> None:
    score(run / "rollouts", str(student), str(teacher), tmp_path / "s", ScoreConfig(signal=signal_, k=4, top_k=8))
    with pytest.raises(InputError, match=cause):
        train_offline(
            run / "rollouts", tmp_path / "s", str(student), tmp_path / "c", replace(CONFIG, objective=objective)
        )
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("signal_", ["hidden8", "topk", "ranks"])
def test_light_signals_train(run: Path, student: Path, teacher: Path, tmp_path: Path, signal_: str) -> None:
    score(run / "rollouts", str(student), str(teacher), tmp_path / "s", ScoreConfig(signal=signal_, k=4, top_k=8))
    objective = replace(OBJECTIVE, direct_weight=float(signal_ != "ranks"))
    train_offline(
        run / "rollouts", tmp_path / "s", str(student), tmp_path / "c", replace(CONFIG, objective=objective, epochs=1)
    )
    learn(run, student, tmp_path / "h", replace(CONFIG, objective=objective, epochs=1))
    assert apart(weights(tmp_path / "c"), weights(student)) > 1e-4
    light, exact = metrics(tmp_path / "c")[0], metrics(tmp_path / "h")[0]  # before the student has moved
    assert light["indirect"] == pytest.approx(exact["indirect"], rel=1e-2 if signal_ == "hidden8" else 1e-5)
    assert light["entropy"] == pytest.approx(exact["entropy"], rel=1e-5)
    if signal_ == "hidden8":
        assert light["direct"] == pytest.approx(exact["direct"], rel=1e-2)
    if signal_ == "topk":
        assert 0 < light["direct"] < exact["direct"]


def test_foreign_scores_are_refused(run: Path, student: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "another"}\n')
    generate(prompts, str(student), tmp_path / "other", GenerateConfig(max_new_tokens=4))
    with pytest.raises(ArtifactError, match="other rollouts"):
        train_offline(tmp_path / "other", run / "scores", str(student), tmp_path / "c", CONFIG)


def test_a_student_of_another_family_is_refused(run: Path, stranger: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="different tokenizers: 1 ids differ"):
        learn(run, stranger, tmp_path / "c")


def test_micro_batches_must_divide(run: Path, student: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Micro-batches of 3 in 1 processes do not divide a batch of 4"):
        learn(run, student, tmp_path / "c", replace(CONFIG, micro_batch_size=3))


def test_compiling_without_hidden_states_is_refused_before_anything_is_written(
    run: Path, student: Path, teacher: Path, tmp_path: Path
) -> None:
    score(run / "rollouts", str(student), str(teacher), tmp_path / "s", ScoreConfig(signal="topk", k=4, top_k=8))
    with pytest.raises(InputError, match="needs the teacher's hidden states"):
        train_offline(run / "rollouts", tmp_path / "s", str(student), tmp_path / "c", replace(CONFIG, compile=True))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("device", "triton", "cause"),
    [
        ("cpu", None, r"a C\+\+ compiler, and nothing-compiles is not installed"),
        ("cuda", None, "needs Triton"),
        ("cuda", "there", "a C compiler, and nothing-compiles is not installed"),
    ],
)
def test_compiling_without_a_compiler_is_refused_before_anything_is_written(
    device: str,
    triton: str | None,
    cause: str,
    run: Path,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("CC", "CXX"):
        monkeypatch.setenv(variable, "nothing-compiles")
    monkeypatch.setattr(loop, "default_device", lambda: device)
    monkeypatch.setattr(settings, "find_spec", lambda _: triton)
    monkeypatch.setattr(loop, "training_arguments", lambda *_: None)
    with pytest.raises(InputError, match=cause) as caught:
        learn(run, student, tmp_path / "c", replace(CONFIG, compile=True))
    assert "leave out --compile" in caught.value.remedy
    assert not (tmp_path / "c").exists()
