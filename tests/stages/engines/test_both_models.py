"""Speculative and teacher-mixed responses equal the definition, token by token."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import exp
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.models import byte_tokenizer
from tests.helpers.training import RecordingObserver
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.randomness import random_integer, random_uniform
from tsdkd.stages.data.requests import Request
from tsdkd.stages.engines.both_models import BothModelsEngine, PartialResponse
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model

CONFIG = GenerateConfig(policy="speculative", max_new_tokens=12, batch_size=3, part_size=4, limit=6, accept_k=8)
VOCAB = 258
LOW_TEMPERATURE = 0.2
"""Makes some tokens of the tiny models frequent."""


@pytest.fixture
def pair(student: Path, teacher: Path) -> tuple[LanguageModel, LanguageModel]:
    return load_model(str(student), "float32"), load_model(str(teacher), "float32")


def next_logits(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.model(torch.tensor([ids])).logits[0, -1, :VOCAB]


def sample_by_definition(
    pair: tuple[LanguageModel, LanguageModel], config: GenerateConfig, prompt: list[int], seed: int
) -> tuple[list[int], int]:
    """Response ids and replaced tokens, one token per forward, unbatched, without a cache, with the engine's noise."""
    engine, ids, replaced = BothModelsEngine(*pair, config), [], 0
    partial = PartialResponse(seed, 0, 0)
    while len(ids) < config.max_new_tokens and not (ids and ids[-1] in pair[0].end_ids):
        student, teacher = (next_logits(model, prompt + ids) for model in pair)
        token = engine._sample(student, partial, len(ids), "student")
        best = teacher.topk(min(config.accept_k, VOCAB))
        if config.policy == "teacher-mixed":
            if random_uniform(seed, len(ids), "whose") < config.teacher_fraction:
                token, replaced = engine._sample(teacher, partial, len(ids), "teacher"), replaced + 1
        elif token not in best.indices.tolist():
            best_only = torch.full_like(teacher, -torch.inf)
            best_only[best.indices] = best.values
            token, replaced = engine._sample(best_only, partial, len(ids), "teacher"), replaced + 1
        ids.append(token)
    return ids, replaced


@pytest.mark.parametrize(
    ("changes", "is_replaced"),
    [
        ({"draft_tokens": 1}, True),
        ({"draft_tokens": 5}, True),
        ({"draft_tokens": 16, "batch_size": 1}, True),
        ({"accept_k": 60, "temperature": 0.7, "top_p": 0.9}, True),
        ({"accept_k": 2, "temperature": 0.0}, True),
        ({"accept_k": VOCAB}, False),
        ({"policy": "teacher-mixed"}, True),
        ({"policy": "teacher-mixed", "draft_tokens": 1, "batch_size": 1, "teacher_fraction": 0.7}, True),
        ({"policy": "teacher-mixed", "draft_tokens": 16, "temperature": 0.7, "top_p": 0.9}, True),
        ({"policy": "teacher-mixed", "teacher_fraction": 0.0}, False),
    ],
)
def test_blocks_equal_the_definition(
    student: Path,
    teacher: Path,
    pair: tuple[LanguageModel, LanguageModel],
    prompts: Path,
    tmp_path: Path,
    changes: dict[str, float],
    is_replaced: bool,
) -> None:
    """Block length and batch change nothing. With `accept_k` of the vocabulary, or fraction 0, no token is replaced."""
    config = replace(CONFIG, **changes)
    artifact = generate(prompts, str(student), tmp_path / "r", config, teachers={"": str(teacher)})
    rows = artifact.table().to_pylist()
    for row in rows:
        seed = random_integer(0, row["sample_id"])
        expected, replaced = sample_by_definition(pair, config, row["prompt_ids"], seed)
        assert (row["response_ids"], row["teacher_tokens"]) == (expected, replaced)
        assert row["author"] == ("mixture" if config.policy == "teacher-mixed" else "both")
    total = artifact.manifest.summary["teacher_tokens"]
    assert total == sum(row["teacher_tokens"] for row in rows)
    assert (total > 0) == is_replaced


WINDOW = 5
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
FAMILIES: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": WINDOW},
    "gemma2": LAYERS | {"query_pre_attn_scalar": 8},
    "gemma3_text": LAYERS | {"query_pre_attn_scalar": 8},
    "gpt_oss": LAYERS | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": WINDOW,
        "num_local_experts": 1,
        "intermediate_size_mlp": 32,
    },
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 21},  # distances in columns, without a window
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 21},  # no position after the longest response
    "mamba": {"num_hidden_layers": 2, "state_size": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def tiny_pair(family: str) -> tuple[LanguageModel, LanguageModel]:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    more = {"vocab_size": 264, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 257}
    config = AutoConfig.for_model(family, **(({} if family in {"mpt", "gpt2"} else sizes) | more | FAMILIES[family]))
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        models.append(LanguageModel(family, model, byte_tokenizer()))
    return models[0], models[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_length_of_a_draft_changes_no_response(family: str) -> None:
    """In padded batches whose sequences exceed the window; with limited positions; with states that only advance."""
    pair = tiny_pair(family)
    config = replace(CONFIG, accept_k=40, draft_tokens=1)
    prompts = [[(7 * i + 3 * j * j + j) % 250 for j in range(length)] for i, length in enumerate([9, 3, 1])]
    requests = [Request(str(i), prompt, i) for i, prompt in enumerate(prompts)]
    expected = [sample_by_definition(pair, config, prompt, i) for i, prompt in enumerate(prompts)]
    assert any(replaced for _, replaced in expected)
    for draft_tokens in (1, 2, 8):
        engine = BothModelsEngine(*pair, replace(config, draft_tokens=draft_tokens))
        assert [(response.ids, response.replaced) for response in engine.sample_together(requests)] == expected


def test_an_end_token_of_either_model_ends_a_response(pair: tuple[LanguageModel, LanguageModel]) -> None:
    student, teacher = pair
    engine = BothModelsEngine(student, replace(teacher), replace(CONFIG, max_new_tokens=8, draft_tokens=2))
    requests = [Request(str(seed), [65, 66], seed) for seed in range(2)]
    third = engine.sample_together(requests)[0].ids[2]
    vars(engine.teacher)["end_ids"] = [third]
    for response in engine.sample_together(requests):
        assert third not in response.ids[:-1]
        assert response.ids[-1] in {third, 257} or len(response.ids) == 8
    assert len(engine.sample_together(requests)[0].ids) <= 3


def test_a_model_without_rollback_drafts_one_token_and_says_so(prompts: Path, tmp_path: Path) -> None:
    for name, language_model in zip(("student", "teacher"), tiny_pair("lfm2"), strict=True):
        language_model.model.save_pretrained(tmp_path / name)
        language_model.tokenizer.save_pretrained(tmp_path / name)
    observer = RecordingObserver()
    rollouts = generate(
        prompts,
        str(tmp_path / "student"),
        tmp_path / "r",
        replace(CONFIG, limit=1, max_new_tokens=2),
        observer=observer,
        teachers={"": str(tmp_path / "teacher")},
    )
    assert rollouts.manifest.config["draft_tokens"] == 1
    assert any("drafts one token at a time" in message for message in observer.messages)


def test_accept_k_of_one_is_the_teachers_greedy_response(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    speculative = generate(
        prompts, str(student), tmp_path / "s", replace(CONFIG, accept_k=1), teachers={"": str(teacher)}
    )
    greedy = replace(CONFIG, policy="teacher", temperature=0.0)
    teacher_only = generate(prompts, None, tmp_path / "t", greedy, teachers={"": str(teacher)})
    assert speculative.table()["response_ids"] == teacher_only.table()["response_ids"]


def test_gumbel_noise_samples_the_distribution(pair: tuple[LanguageModel, LanguageModel]) -> None:
    """4,000 draws from logits (0, 1, 2) at temperature 2: each count within 4.5 standard deviations."""
    engine = BothModelsEngine(*pair, replace(CONFIG, temperature=2.0))
    draws = Counter(
        engine._sample(torch.tensor([0.0, 1.0, 2.0]), PartialResponse(seed, 0, 0), 3, "student") for seed in range(4000)
    )
    weights = [exp(i / 2) for i in range(3)]
    for i, weight in enumerate(weights):
        p = weight / sum(weights)
        assert abs(draws[i] - 4000 * p) < 4.5 * (4000 * p * (1 - p)) ** 0.5


def test_tokens_come_from_the_mixture(pair: tuple[LanguageModel, LanguageModel]) -> None:
    """First and second tokens of 3,000 responses follow a p + (1 - a) q: chi-square within 4 standard deviations."""
    config = replace(
        CONFIG,
        policy="teacher-mixed",
        teacher_fraction=0.4,
        temperature=LOW_TEMPERATURE,
        max_new_tokens=2,
        draft_tokens=2,
    )
    prompt = [65, 66, 67]
    requests = [Request(str(seed), prompt, seed) for seed in range(3000)]
    responses = BothModelsEngine(*pair, config).sample_together(requests)
    first = Counter(response.ids[0] for response in responses)
    assert deviations(first, mixture(pair, prompt, 0.4)) < 4
    assert deviations(first, mixture(pair, prompt, 0.0)) > 40
    (common, _), *_ = first.most_common()
    second = Counter(response.ids[1] for response in responses if response.ids[0] == common)
    assert deviations(second, mixture(pair, [*prompt, common], 0.4)) < 4
    replaced = sum(response.replaced for response in responses)
    tokens = sum(len(response.ids) for response in responses)
    assert abs(replaced - 0.4 * tokens) < 4 * (tokens * 0.4 * 0.6) ** 0.5


def mixture(pair: tuple[LanguageModel, LanguageModel], ids: list[int], teacher_fraction: float) -> torch.Tensor:
    q, p = ((next_logits(model, ids) / LOW_TEMPERATURE).softmax(-1) for model in pair)
    return teacher_fraction * p + (1 - teacher_fraction) * q


def deviations(counts: Counter[int], probs: torch.Tensor) -> float:
    """Standard deviations by which Pearson's chi-square exceeds its mean; rare tokens form one class."""
    expected = probs * counts.total()
    observed = torch.tensor([float(counts[i]) for i in range(len(probs))])
    rare = expected < 5
    expected, observed = (torch.cat([x[~rare], x[rare].sum().unsqueeze(0)]) for x in (expected, observed))
    freedom = len(expected) - 1
    return float(((observed - expected).square() / expected).sum() - freedom) / (2 * freedom) ** 0.5


def test_an_interrupted_teacher_mixed_run_resumes_with_the_same_bytes(
    student: Path,
    teacher: Path,
    prompts: Path,
    tmp_path: Path,
    contents: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, write = replace(CONFIG, policy="teacher-mixed"), Writer.write_table
    whole = generate(prompts, str(student), tmp_path / "whole", config, teachers={"": str(teacher)})

    def interrupted(self: Writer, file: str, *args: object) -> None:
        if file == whole.tables[-1].file:
            raise KeyboardInterrupt
        write(self, file, *args)

    monkeypatch.setattr(Writer, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(prompts, str(student), tmp_path / "cut", config, teachers={"": str(teacher)})
    monkeypatch.undo()
    generate(prompts, str(student), tmp_path / "cut", config, teachers={"": str(teacher)})
    assert len(whole.tables) == 2
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("policy", ["speculative", "teacher-mixed"])
def test_policies_of_two_models_require_transformers_and_a_teacher(
    student: Path, prompts: Path, tmp_path: Path, policy: str
) -> None:
    config = replace(CONFIG, policy=policy)
    with pytest.raises(InputError, match=f"{policy.capitalize()} responses need the transformers engine"):
        generate(prompts, str(student), tmp_path / "r", replace(config, engine="vllm"), teachers={"": str(student)})
    with pytest.raises(InputError, match="needs a student and a teacher"):
        generate(prompts, str(student), tmp_path / "r", config)
    assert not (tmp_path / "r").exists()
