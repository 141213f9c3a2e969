"""From prompts to parts: who answers what, and how little of it is in memory."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.prompts import write_prompts
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.generate.requests import PromptRequests

CONFIG = GenerateConfig(policy="mixed", samples_per_prompt=2)


class Bytes:
    """A tokenizer of one token a byte."""

    chat_template = "there is one"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return messages[-1]["content"]

    def __call__(self, text: str, **_: object) -> Any:
        return type("Encoding", (), {"input_ids": list(text.encode())})


def jobs_of(file: Path, config: GenerateConfig = CONFIG, seed: int = 0) -> PromptRequests:
    return PromptRequests(Prompts(file), Bytes(), config, 7, seed)  # type: ignore[arg-type]


def prompts_by_author(jobs: PromptRequests) -> dict[str, set[str]]:
    census = jobs.count()
    return {
        author: {prompt.prompt_id for part in jobs.parts(author, census) for prompt in part.prompts}
        for author in ("student", "teacher")
    }


def test_parts_have_one_author_and_follow_each_other(tmp_path: Path) -> None:
    jobs = jobs_of(write_prompts(tmp_path / "p.jsonl", 40))
    census = jobs.count()
    parts = [part for author in ("student", "teacher") for part in jobs.parts(author, census)]
    assert [part.file for part in parts] == [f"part-{i:05d}.parquet" for i in range(len(parts))]
    ids = [job.sample_id for part in parts for job in part.requests]
    assert len(ids) == len(set(ids)) == 80 == 2 * census.prompts.total()
    assert len({job.seed for part in parts for job in part.requests}) == 80
    assert all(len(part.requests) == 7 for part in parts[:-1] if part.author == parts[parts.index(part) + 1].author)


def test_lambda_is_the_students_share_and_more_of_it_only_adds(tmp_path: Path) -> None:
    """400 prompts: the share is within 4 standard deviations (0.1); 0 and 1 are exact."""
    file = write_prompts(tmp_path / "p.jsonl", 400)
    before: set[str] = set()
    for share in (0.0, 0.3, 0.7, 1.0):
        found = prompts_by_author(jobs_of(file, replace(CONFIG, student_fraction=share)))
        assert not found["student"] & found["teacher"]
        assert abs(len(found["student"]) / 400 - share) <= (0.1 if 0 < share < 1 else 0)
        assert before <= found["student"]
        before = found["student"]


def test_who_answers_depends_on_prompt_and_seed_alone(tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "p.jsonl", 60)
    backwards = tmp_path / "b.jsonl"
    backwards.write_text("\n".join(reversed(file.read_text().splitlines())))
    assert prompts_by_author(jobs_of(file)) == prompts_by_author(jobs_of(backwards))
    assert prompts_by_author(jobs_of(file)) != prompts_by_author(jobs_of(file, seed=1))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_memory_does_not_grow_with_the_prompts(tmp_path: Path, suffix: str) -> None:
    """Each prompt of 2,000 characters leaves a digest behind: about 200 bytes with its place in a set."""

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
        jobs = jobs_of(file, GenerateConfig(max_prompt_tokens=5000))
        tracemalloc.start()
        census = jobs.count()
        assert sum(len(part.requests) for part in jobs.parts("student", census)) == count
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    def quietest(count: int) -> int:
        """Of three looks: other threads of the process allocate too."""
        return min(peak(count) for _ in range(3))

    assert quietest(900) - quietest(300) < 600 * 500  # the prompts alone are 2,000 each
