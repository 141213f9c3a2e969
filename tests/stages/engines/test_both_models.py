"""Speculative and teacher-mixed rollouts: what two models write together, held to the definition token by token."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import exp
from pathlib import Path

import pytest
import torch

from tsdkd.artifacts.writer import Writer
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.randomness import random_integer, random_uniform
from tsdkd.stages.data.requests import Request
from tsdkd.stages.engines.both_models import BothModelsEngine, PartialResponse
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.load import LanguageModel, load_model

CONFIG = GenerateConfig(policy="speculative", max_new_tokens=12, batch_size=3, part_size=4, limit=6, accept_k=8)
VOCAB = 258
WARM = 0.2
"""A temperature at which some tokens of the tiny models are frequent."""


@pytest.fixture
def pair(student: Path, teacher: Path) -> tuple[LanguageModel, LanguageModel]:
    return load_model(str(student), "float32"), load_model(str(teacher), "float32")


def logits(reader: LanguageModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return reader.model(torch.tensor([ids])).logits[0, -1, :VOCAB]


def by_definition(
    pair: tuple[LanguageModel, LanguageModel], config: GenerateConfig, prompt: list[int], seed: int
) -> tuple[list[int], int]:
    """One token after the other, unbatched, without a cache; the engine's own noise."""
    engine, ids, replaced = BothModelsEngine(*pair, config), [], 0
    row = PartialResponse(seed, 0, 0)
    while len(ids) < config.max_new_tokens and not (ids and ids[-1] in pair[0].end_ids):
        student, teacher = (logits(reader, prompt + ids) for reader in pair)
        token = engine._sample(student, row, len(ids), "student")
        best = teacher.topk(min(config.accept_k, VOCAB))
        if config.policy == "teacher-mixed":
            if random_uniform(seed, len(ids), "whose") < config.teacher_fraction:
                token, replaced = engine._sample(teacher, row, len(ids), "teacher"), replaced + 1
        elif token not in best.indices.tolist():
            among = torch.full_like(teacher, -torch.inf)
            among[best.indices] = best.values
            token, replaced = engine._sample(among, row, len(ids), "teacher"), replaced + 1
        ids.append(token)
    return ids, replaced


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"draft_tokens": 1}, 1),
        ({"draft_tokens": 5}, 1),
        ({"draft_tokens": 16, "batch_size": 1}, 1),
        ({"accept_k": 60, "temperature": 0.7, "top_p": 0.9}, 1),
        ({"accept_k": 2, "temperature": 0.0}, 1),
        ({"accept_k": VOCAB}, 0),
        ({"policy": "teacher-mixed"}, 1),
        ({"policy": "teacher-mixed", "draft_tokens": 1, "batch_size": 1, "teacher_fraction": 0.7}, 1),
        ({"policy": "teacher-mixed", "draft_tokens": 16, "temperature": 0.7, "top_p": 0.9}, 1),
        ({"policy": "teacher-mixed", "teacher_fraction": 0.0}, 0),
    ],
)
def test_blocks_are_the_definition(
    student: Path,
    teacher: Path,
    pair: tuple[LanguageModel, LanguageModel],
    prompts: Path,
    tmp_path: Path,
    changes: dict[str, float],
    most: int,
) -> None:
    """Whatever the draft's length and the batch; with K = vocabulary, or no share, the student's tokens all stay."""
    config = replace(CONFIG, **changes)
    artifact = generate(prompts, str(student), tmp_path / "r", config, teacher=str(teacher))
    rows = artifact.table().to_pylist()
    for row in rows:
        seed = random_integer(0, row["sample_id"])
        expected, replaced = by_definition(pair, config, row["prompt_ids"], seed)
        assert (row["response_ids"], row["teacher_tokens"]) == (expected, replaced)
        assert row["author"] == ("mixture" if config.policy == "teacher-mixed" else "both")
    found = artifact.manifest.summary["teacher_tokens"]
    assert found == sum(row["teacher_tokens"] for row in rows)
    assert (found > 0) == bool(most)


def test_the_best_token_alone_is_the_teachers_greedy_answer(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    together = generate(prompts, str(student), tmp_path / "s", replace(CONFIG, accept_k=1), teacher=str(teacher))
    greedy = replace(CONFIG, policy="teacher", temperature=0.0)
    alone = generate(prompts, str(teacher), tmp_path / "t", greedy)
    assert together.table()["response_ids"] == alone.table()["response_ids"]


def test_the_noise_samples_the_distribution(pair: tuple[LanguageModel, LanguageModel]) -> None:
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
    """The first and second of 3,000 responses, against a p + (1 - a) q: chi-square, at most 4 deviations too large."""
    config = replace(
        CONFIG, policy="teacher-mixed", teacher_fraction=0.4, temperature=WARM, max_new_tokens=2, draft_tokens=2
    )
    prompt = [65, 66, 67]
    jobs = [Request(str(seed), prompt, seed) for seed in range(3000)]
    written = BothModelsEngine(*pair, config)._write(jobs)
    first = Counter(response.ids[0] for response in written)
    assert deviations(first, mixture(pair, prompt, 0.4)) < 4
    assert deviations(first, mixture(pair, prompt, 0.0)) > 40
    (common, _), *_ = first.most_common()
    second = Counter(response.ids[1] for response in written if response.ids[0] == common)
    assert deviations(second, mixture(pair, [*prompt, common], 0.4)) < 4
    chosen = sum(response.replaced for response in written)
    tokens = sum(len(response.ids) for response in written)
    assert abs(chosen - 0.4 * tokens) < 4 * (tokens * 0.4 * 0.6) ** 0.5


def mixture(pair: tuple[LanguageModel, LanguageModel], ids: list[int], share: float) -> torch.Tensor:
    q, p = ((logits(reader, ids) / WARM).softmax(-1) for reader in pair)
    return share * p + (1 - share) * q


def deviations(counts: Counter[int], chances: torch.Tensor) -> float:
    """By how many of its standard deviations Pearson's chi-square exceeds its mean; rare tokens are one class."""
    expected = chances * counts.total()
    found = torch.tensor([float(counts[i]) for i in range(len(chances))])
    rare = expected < 5
    expected, found = (torch.cat([x[~rare], x[rare].sum().unsqueeze(0)]) for x in (expected, found))
    freedom = len(expected) - 1
    return float(((found - expected).square() / expected).sum() - freedom) / (2 * freedom) ** 0.5


def test_a_cut_run_of_a_mixture_resumes_with_the_same_bytes(
    student: Path,
    teacher: Path,
    prompts: Path,
    tmp_path: Path,
    contents: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, write = replace(CONFIG, policy="teacher-mixed"), Writer.write_table
    whole = generate(prompts, str(student), tmp_path / "whole", config, teacher=str(teacher))

    def interrupted(self: Writer, file: str, *args: object) -> None:
        if file == whole.tables[-1].file:
            raise KeyboardInterrupt
        write(self, file, *args)

    monkeypatch.setattr(Writer, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(prompts, str(student), tmp_path / "cut", config, teacher=str(teacher))
    monkeypatch.undo()
    generate(prompts, str(student), tmp_path / "cut", config, teacher=str(teacher))
    assert len(whole.tables) == 2
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("policy", ["speculative", "teacher-mixed"])
def test_it_is_transformers_alone_and_takes_two(student: Path, prompts: Path, tmp_path: Path, policy: str) -> None:
    config = replace(CONFIG, policy=policy)
    with pytest.raises(InputError, match=f"{policy.capitalize()} responses need the transformers engine"):
        generate(prompts, str(student), tmp_path / "r", replace(config, engine="vllm"), teacher=str(student))
    with pytest.raises(InputError, match="needs a student and a teacher"):
        generate(prompts, str(student), tmp_path / "r", config)
    assert not (tmp_path / "r").exists()
