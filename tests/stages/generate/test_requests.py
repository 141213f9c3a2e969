"""Requests from prompts: authors, parts and seeds, and constant memory."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.models import byte_tokenizer
from tests.helpers.prompts import write_prompts
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.generate.requests import Authorship, PromptRequests

CONFIG = GenerateConfig(policy="mixed", samples_per_prompt=2)


def requests_of(file: Path, config: GenerateConfig = CONFIG, seed: int = 0) -> PromptRequests:
    return PromptRequests(Prompts(file), byte_tokenizer(), config, 7, seed)


def prompts_by_author(requests: PromptRequests) -> dict[str, set[str]]:
    counts = requests.count()
    return {
        author: {prompt.prompt_id for part in requests.parts(Authorship(author), counts) for prompt in part.prompts}
        for author in ("student", "teacher")
    }


def test_parts_have_one_author_and_follow_each_other(tmp_path: Path) -> None:
    requests = requests_of(write_prompts(tmp_path / "p.jsonl", 40))
    counts = requests.count()
    by_author = {author: list(requests.parts(Authorship(author), counts)) for author in ("student", "teacher")}
    parts = [*by_author["student"], *by_author["teacher"]]
    assert [part.file for part in parts] == [f"part-{i:05d}.parquet" for i in range(len(parts))]
    ids = [request.sample_id for part in parts for request in part.requests]
    assert len(ids) == len(set(ids)) == 80 == 2 * counts.total
    assert len({request.seed for part in parts for request in part.requests}) == 80
    assert all(len(part.requests) == 7 for parts in by_author.values() for part in parts[:-1])


def test_a_larger_student_fraction_only_adds_prompts_to_the_students(tmp_path: Path) -> None:
    """400 prompts: the fraction is within 4 standard deviations (0.1); 0 and 1 are exact."""
    file = write_prompts(tmp_path / "p.jsonl", 400)
    before: set[str] = set()
    for fraction in (0.0, 0.3, 0.7, 1.0):
        prompts = prompts_by_author(requests_of(file, replace(CONFIG, student_fraction=fraction)))
        assert not prompts["student"] & prompts["teacher"]
        assert abs(len(prompts["student"]) / 400 - fraction) <= (0.1 if 0 < fraction < 1 else 0)
        assert before <= prompts["student"]
        before = prompts["student"]


def test_the_author_depends_on_prompt_and_seed_alone(tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "p.jsonl", 60)
    backwards = tmp_path / "b.jsonl"
    backwards.write_text("\n".join(reversed(file.read_text().splitlines())))
    assert prompts_by_author(requests_of(file)) == prompts_by_author(requests_of(backwards))
    assert prompts_by_author(requests_of(file)) != prompts_by_author(requests_of(file, seed=1))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_memory_does_not_grow_with_the_prompts(tmp_path: Path, suffix: str) -> None:
    """Of each prompt of 2,000 characters a digest stays in a set: about 200 bytes."""

    def peak(count: int) -> int:
        file = tmp_path / f"p{count}{suffix}"
        texts = [f"{i} ".ljust(2000, "x") for i in range(count)]
        if suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table({"prompt": texts}), file, row_group_size=200)
        elif suffix == ".csv":
            file.write_text("\n".join(["prompt", *texts]))
        else:
            file.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
        del texts
        requests = requests_of(file, GenerateConfig(max_prompt_tokens=5000))
        tracemalloc.start()
        counts = requests.count()
        assert sum(len(part.requests) for part in requests.parts(Authorship("student"), counts)) == count
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    def smallest_peak(count: int) -> int:
        """The smallest of three peaks: other threads of the process allocate memory too."""
        return min(peak(count) for _ in range(3))

    assert smallest_peak(900) - smallest_peak(300) < 600 * 500  # the prompts alone are 2,000 each
