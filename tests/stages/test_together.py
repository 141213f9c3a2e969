"""Speculative rollouts: what student and teacher write together, held to the definition token by token."""

from collections import Counter
from dataclasses import replace
from math import exp
from pathlib import Path

import pytest
import torch

from tsdkd.errors import InputError
from tsdkd.stages.config import GenerateConfig
from tsdkd.stages.generate import generate
from tsdkd.stages.models import LanguageModel, load_model
from tsdkd.stages.rollouts.together import Row, TogetherEngine

CONFIG = GenerateConfig(policy="speculative", max_new_tokens=12, batch_size=3, part_size=4, limit=6, accept_k=8)
VOCAB = 258


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
    engine, ids, replaced = TogetherEngine(*pair, config), [], 0
    row = Row(seed, 0, 0)
    while len(ids) < config.max_new_tokens and not (ids and ids[-1] in pair[0].end_ids):
        student, teacher = (logits(reader, prompt + ids) for reader in pair)
        token = engine._sample(student, row, len(ids), "student")
        best = teacher.topk(min(config.accept_k, VOCAB))
        if token not in best.indices.tolist():
            among = torch.full_like(teacher, -torch.inf)
            among[best.indices] = best.values
            token, replaced = engine._sample(among, row, len(ids), "teacher"), replaced + 1
        ids.append(token)
    return ids, replaced


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"draft": 1}, 1),
        ({"draft": 5}, 1),
        ({"draft": 16, "batch_size": 1}, 1),
        ({"accept_k": 60, "temperature": 0.7, "top_p": 0.9}, 1),
        ({"accept_k": 2, "temperature": 0.0}, 1),
        ({"accept_k": VOCAB}, 0),
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
    """Whatever the draft's length and the batch; with K = vocabulary nothing of the student's is replaced."""
    config = replace(CONFIG, **changes)
    artifact = generate(prompts, str(student), tmp_path / "r", config, teacher=str(teacher))
    from tsdkd.stages.rollouts.jobs import digest

    rows = artifact.table().to_pylist()
    for row in rows:
        seed = int(digest([0, row["sample_id"]])[:15], 16)
        expected, replaced = by_definition(pair, config, row["prompt_ids"], seed)
        assert (row["response_ids"], row["teacher_tokens"]) == (expected, replaced)
        assert row["author"] == "both"
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
    engine = TogetherEngine(*pair, replace(CONFIG, temperature=2.0))
    draws = Counter(
        engine._sample(torch.tensor([0.0, 1.0, 2.0]), Row(seed, 0, 0), 3, "student") for seed in range(4000)
    )
    weights = [exp(i / 2) for i in range(3)]
    for i, weight in enumerate(weights):
        p = weight / sum(weights)
        assert abs(draws[i] - 4000 * p) < 4.5 * (4000 * p * (1 - p)) ** 0.5


def test_it_is_transformers_alone_and_takes_two(student: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="need the transformers engine"):
        generate(prompts, str(student), tmp_path / "r", replace(CONFIG, engine="vllm"), teacher=str(student))
    with pytest.raises(InputError, match="needs a student and a teacher"):
        generate(prompts, str(student), tmp_path / "r", CONFIG)
    assert not (tmp_path / "r").exists()
