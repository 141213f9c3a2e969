"""Packed micro-batches: the update of padded ones, whatever the tokens of a micro-batch and the ranks."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.models import byte_tokenizer
from tests.helpers.training import CONFIG, SAMPLING, RecordingObserver, cut, learn, metrics, same_update, weights
from tsdkd.artifacts.json_files import read_json
from tsdkd.core import AdaptiveOpener
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig, ReplayConfig, TrainConfig
from tsdkd.stages.data.batches import even_batches
from tsdkd.stages.data.replay import ReplaySchedule
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.methods import find_method
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.train import trainer as trainer_module
from tsdkd.stages.train.batch_order import pack_samples
from tsdkd.stages.train.settings import recorded_settings
from tsdkd.stages.train.stage import train_online


def packed(config: TrainConfig = CONFIG, tokens: int = 150) -> TrainConfig:
    return replace(config, micro_batch_size=None, micro_batch_tokens=tokens)


def by_number(opener: AdaptiveOpener, uncertainty: float) -> float:
    """An opener that depends on the order of the responses, whatever the models."""
    opener._recent.append(uncertainty)
    return (0.2, 0.6, 1.0)[len(opener._recent) % 3]


@pytest.mark.parametrize("change", ["fixed opener", "adaptive opener", "checkpointing, held out"])
def test_packed_micro_batches_give_the_update_of_padded_ones(
    run: Path, student: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student reads sequences in rows of at most 150 tokens, and no padding."""
    config = CONFIG
    if change == "adaptive opener":
        config = replace(CONFIG, objective=replace(CONFIG.objective, opener="adaptive"))
        monkeypatch.setattr(AdaptiveOpener, "_update", by_number)
    if "held out" in change:
        config = replace(CONFIG, gradient_checkpointing=True, held_out=0.3, eval_steps=2)
    expected = learn(run, student, tmp_path / "padded", config)
    read: list[torch.Size] = []
    hidden_states = trainer_module.hidden_states

    def spy(model: object, ids: torch.Tensor, mask: object, positions: torch.Tensor) -> torch.Tensor:
        assert mask is None
        read.append(ids.shape)
        return hidden_states(model, ids, mask, positions)

    monkeypatch.setattr(trainer_module, "hidden_states", spy)
    found = learn(run, student, tmp_path / "packed", packed(config))
    assert same_update(found, expected, weights(student))
    for entry, other in zip(metrics(tmp_path / "packed"), metrics(tmp_path / "padded"), strict=True):
        for name in ("drift", "candidate_overlap"):  # read on 64 tokens of each micro-batch
            entry.pop(name, None), other.pop(name, None)
        assert entry == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert all(rows == 1 and tokens <= 150 for rows, tokens in read)
    assert max(tokens for _, tokens in read) > 60  # several sequences
    assert "tsdkd" not in str(read_json(tmp_path / "packed" / "config.json"))


def test_packed_adapters_learn_the_same(run: Path, student: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, lora=LoRAConfig(rank=4, merge=True), epochs=1)
    expected, found = (
        learn(run, student, tmp_path / name, c) for name, c in (("padded", config), ("packed", packed(config)))
    )
    assert same_update(found, expected, weights(student))


def test_packed_online_training_samples_and_learns_the_same(
    prompts: Path, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Responses are sampled from padded prompts; a teacher that cannot pack reads padded sequences."""
    sampling = replace(SAMPLING, temperature=0, max_prompt_tokens=100)
    config = replace(CONFIG, online=OnlineConfig(sampling=sampling), epochs=1)
    problem = property(lambda model: "mixes sequences" if model.name == str(teacher) else None)
    monkeypatch.setattr(LanguageModel, "packing_problem", problem)
    found: list[dict[str, torch.Tensor]] = []
    observer = RecordingObserver()
    for name, each in (("padded", config), ("packed", packed(config))):
        train_online(prompts, str(student), str(teacher), tmp_path / name, each, observer=observer)
        found.append(weights(tmp_path / name))
    assert same_update(found[1], found[0], weights(student))
    assert observer.messages.count(f"{teacher} reads padded batches: it mixes sequences.") == 1


def test_packed_replay_learns_the_same_and_resumes(
    prompts: Path,
    student: Path,
    teacher: Path,
    tmp_path: Path,
    contents: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Responses of all three kinds have lengths of their own; held-out prompts are measured in every step."""
    sampling = replace(SAMPLING, temperature=0, max_prompt_tokens=100)
    off_policy = GenerateConfig(policy="teacher", max_new_tokens=8)
    recorded = generate(prompts, None, tmp_path / "r", off_policy, teachers={"": str(teacher)}).path
    replay, choices = ReplayConfig(phi=0.8, replay_capacity=4), list[str]()
    online = OnlineConfig(sampling=sampling, student_fraction=0.0, replay=replay)
    method = find_method("distillm")
    config = replace(CONFIG, method=method.name, objective=method.objective, online=online, held_out=0.3, eval_steps=1)
    choose = ReplaySchedule.choose_responses

    def spy(self: ReplaySchedule, *given: float) -> str:
        choices.append(choose(self, *given))
        return choices[-1]

    monkeypatch.setattr(ReplaySchedule, "choose_responses", spy)
    found: list[dict[str, torch.Tensor]] = []
    for name, each in (("padded", config), ("packed", packed(config, 120))):
        train_online(recorded, str(student), str(teacher), tmp_path / name, each)
        found.append(weights(tmp_path / name))
    assert set(choices) == {"recorded", "sampled", "replayed"}
    assert same_update(found[1], found[0], weights(student))
    for entry, other in zip(metrics(tmp_path / "packed"), metrics(tmp_path / "padded"), strict=True):
        assert entry == pytest.approx(other, rel=1e-3, abs=1e-6)
    with monkeypatch.context() as patch:
        cut(patch, 3)
        with pytest.raises(RuntimeError, match="cut"):
            train_online(recorded, str(student), str(teacher), tmp_path / "cut", packed(config, 120))
    train_online(recorded, str(student), str(teacher), tmp_path / "cut", packed(config, 120))
    assert contents(tmp_path / "cut") == contents(tmp_path / "packed")


def test_recorded_responses_are_measured_by_their_own_lengths(
    prompts: Path, student: Path, teacher: Path, tmp_path: Path
) -> None:
    """Not by the limits of sampled ones: longer responses would fit in no micro-batch, shorter ones be refused."""
    sampling = GenerateConfig(policy="teacher", max_new_tokens=30, engine="transformers")
    recorded = generate(prompts, None, tmp_path / "r", sampling, teachers={"": str(teacher)})
    longest = max(len(row["prompt_ids"]) + len(row["response_ids"]) for row in recorded.table().to_pylist())
    for limit in (5, 500):
        online = OnlineConfig(sampling=replace(SAMPLING, max_prompt_tokens=limit), student_fraction=0.0)
        config = replace(CONFIG, epochs=1, method="gkd", objective=find_method("gkd").objective, online=online)
        with pytest.raises(InputError, match=f"reach {longest} tokens, more than --micro-batch-tokens 40"):
            train_online(recorded.path, str(student), str(teacher), tmp_path / "c", packed(config, 40))
        train_online(recorded.path, str(student), str(teacher), tmp_path / str(limit), packed(config, longest))


def test_a_longer_sequence_ends_the_search_for_batches() -> None:
    with pytest.raises(ValueError, match="longer than 5 tokens"):
        even_batches([3, 6, 2], 5, 2)


def test_both_limits_are_refused() -> None:
    with pytest.raises(InputError, match="both given"):
        replace(CONFIG, micro_batch_tokens=100)


def test_a_longer_sequence_is_refused_before_anything_is_written(run: Path, student: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="more than --micro-batch-tokens 20") as caught:
        learn(run, student, tmp_path / "c", packed(tokens=20))
    assert "Raise it to" in caught.value.remedy
    assert not (tmp_path / "c").exists()


def test_a_student_that_cannot_pack_is_refused(run: Path, tmp_path: Path) -> None:
    config = AutoConfig.for_model("mamba", vocab_size=264, hidden_size=32, num_hidden_layers=2, state_size=8)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    byte_tokenizer().save_pretrained(tmp_path / "mamba")
    with pytest.raises(InputError, match="mixes the sequences of a packed batch") as caught:
        learn(run, tmp_path / "mamba", tmp_path / "c", packed())
    assert "--micro-batch-size" in caught.value.remedy
    assert not list((tmp_path / "c").glob("*.safetensors"))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 4), st.booleans())
def test_ranks_share_an_optimizer_batch(lengths: list[int], ranks: int, in_order: bool) -> None:
    by_rank = [pack_samples(lengths, 60, rank, ranks, in_order=in_order) for rank in range(ranks)]
    rounds = [list(chain.from_iterable(batches)) for batches in zip(*by_rank, strict=True)]
    assert sorted(chain.from_iterable(rounds)) == list(range(len(lengths)))
    tokens = [sum(lengths[i] for batch in batches for i in batch) for batches in by_rank]
    if in_order:
        assert list(chain.from_iterable(rounds)) == list(range(len(lengths)))
    else:
        assert max(tokens) - min(tokens) <= max(lengths) * len(rounds)


def test_the_default_size_of_micro_batches_is_recorded_as_a_number() -> None:
    """So a checkpoint does not depend on whether the default is given, and one of an earlier version continues."""
    config = TrainConfig(batch_size=8)
    recorded = recorded_settings(config)
    assert recorded == recorded_settings(replace(config, micro_batch_size=8))
    assert "micro_batch_tokens" not in recorded
    assert recorded_settings(replace(config, micro_batch_tokens=64))["micro_batch_tokens"] == 64
