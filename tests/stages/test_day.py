"""Chat templates that write the day: one artifact has one day, also if it is made on several days."""

import datetime as real
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from tests.helpers.models import CHAT, byte_tokenizer
from tests.helpers.training import CONFIG as TRAINING
from tests.helpers.training import cut
from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.reader import Artifact
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.prune import PruneConfig
from tsdkd.stages.config.train import OnlineConfig
from tsdkd.stages.data import online
from tsdkd.stages.engines import transformers_engine
from tsdkd.stages.eval.stage import evaluate
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models import record
from tsdkd.stages.prune import prune
from tsdkd.stages.results.compare import compare
from tsdkd.stages.train.stage import train_online

CONFIG = GenerateConfig(max_new_tokens=3, batch_size=4, part_size=4)
Day = Callable[[str], None]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Day:
    """Sets today's date."""

    def set_day(day: str) -> None:
        class Clock(real.datetime):
            @classmethod
            def now(cls, tz: real.tzinfo | None = None) -> "Clock":
                return cls.fromisoformat(f"{day}T12:30:00")

        for module in (record, chat_template_utils):
            monkeypatch.setattr(module, "datetime", Clock, raising=False)

    return set_day


@pytest.fixture
def dated(student: Path, tmp_path: Path) -> Path:
    """A model whose template writes the day."""
    path = tmp_path / "dated"
    shutil.copytree(student, path)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "Today is {{ strftime_now('%d %b %Y') }}.\n" + CHAT
    tokenizer.save_pretrained(path)
    return path


def days(artifact: Artifact) -> set[str]:
    decode = byte_tokenizer().decode
    return {decode(ids).split(".\n")[0] for ids in artifact.table()["prompt_ids"].to_pylist()}


def interrupt(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> None:
    """The function raises KeyboardInterrupt at its n-th call."""
    original, calls = getattr(module, name), iter(range(1, 1000))

    def interrupted(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(module, name, interrupted)


def test_rollouts_that_are_continued_on_another_day_have_the_day_of_the_first_part(
    dated: Path, prompts: Path, tmp_path: Path, on: Day, contents: Any
) -> None:
    on("2026-03-01")
    whole = generate(prompts, str(dated), tmp_path / "whole", CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, transformers_engine, "sample_responses", 2)
        with pytest.raises(KeyboardInterrupt):
            generate(prompts, str(dated), tmp_path / "cut", CONFIG)
    on("2026-03-04")
    cut = generate(prompts, str(dated), tmp_path / "cut", CONFIG)
    assert days(cut) == days(whole) == {"Today is 01 Mar 2026"}
    assert cut.manifest.day == "2026-03-01"
    assert contents(cut.path) == contents(whole.path)
    again = generate(prompts, str(dated), tmp_path / "cut", CONFIG)
    assert again.fingerprint == cut.fingerprint
    replaced = generate(prompts, str(dated), tmp_path / "cut", CONFIG, overwrite=True)
    assert days(replaced) == {"Today is 04 Mar 2026"}


OTHER, THIRD = replace(CONFIG, temperature=0.5), replace(CONFIG, temperature=0.7)


@pytest.mark.parametrize(
    ("config", "overwrite", "day"),
    [
        (CONFIG, False, "2026-03-01"),  # complete: nothing to do
        (CONFIG, True, "2026-03-03"),
        (OTHER, False, "2026-03-02"),  # continues the replacement
        (OTHER, True, "2026-03-02"),
        (THIRD, True, "2026-03-03"),  # begins another replacement
    ],
)
def test_after_an_interrupted_replacement_the_day_is_that_of_what_is_continued(
    dated: Path, prompts: Path, tmp_path: Path, on: Day, config: GenerateConfig, overwrite: bool, day: str
) -> None:
    path = tmp_path / "r"
    on("2026-03-01")
    generate(prompts, str(dated), path, CONFIG)
    on("2026-03-02")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, transformers_engine, "sample_responses", 2)
        with pytest.raises(KeyboardInterrupt):
            generate(prompts, str(dated), path, OTHER, overwrite=True)
    on("2026-03-03")
    made = generate(prompts, str(dated), path, config, overwrite=overwrite)
    assert made.manifest.day == day
    assert days(made) == {f"Today is {day[-2:]} Mar 2026"}


@pytest.mark.parametrize("existing", ["partial", "of an earlier format"])
def test_an_artifact_that_cannot_be_continued_leaves_its_successor_no_day(
    dated: Path, prompts: Path, tmp_path: Path, on: Day, existing: str
) -> None:
    on("2026-03-01")
    made = generate(prompts, str(dated), tmp_path / "r", OTHER)
    changes = {"state": "partial"} if existing == "partial" else {"format": 1}
    content = json.loads((made.path / MANIFEST_FILE).read_text()) | changes
    (made.path / MANIFEST_FILE).write_text(json.dumps(content))
    on("2026-03-02")
    assert generate(prompts, str(dated), made.path, CONFIG, overwrite=True).manifest.day == "2026-03-02"


def test_other_templates_record_no_day(student: Path, prompts: Path, tmp_path: Path) -> None:
    assert generate(prompts, str(student), tmp_path / "r", replace(CONFIG, limit=1)).manifest.day is None


def test_online_training_resumes_with_its_day(
    dated: Path, teacher: Path, prompts: Path, tmp_path: Path, on: Day, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[set[str]] = []
    original = online.prompt_token_ids

    def spy(*args: Any) -> list[int]:
        ids = original(*args)
        read[-1].add(byte_tokenizer().decode(ids).split(".\n")[0])
        return ids

    monkeypatch.setattr(online, "prompt_token_ids", spy)
    config = replace(TRAINING, save_steps=1, online=OnlineConfig(sampling=replace(CONFIG, limit=4)))

    def learn() -> Artifact:
        read.append(set())
        return train_online(prompts, str(dated), str(teacher), tmp_path / "c", config)

    on("2026-03-01")
    with monkeypatch.context() as patch:
        cut(patch, 1)
        with pytest.raises(RuntimeError, match="cut"):
            learn()
    on("2026-03-02")
    assert learn().manifest.day == "2026-03-01"
    assert read == [{"Today is 01 Mar 2026"}] * 2


def test_pruning_records_its_day(dated: Path, prompts: Path, tmp_path: Path, on: Day) -> None:
    on("2026-03-01")
    assert prune(str(dated), prompts, tmp_path / "p", PruneConfig(drop=1, limit=1)).manifest.day == "2026-03-01"


def test_benchmarks_of_one_results_artifact_have_one_day(dated: Path, rows: Path, tmp_path: Path, on: Day) -> None:
    """A comparison says where two models were prompted on different days."""
    config = EvalConfig(("sciq",), limit=1, max_new_tokens=4)
    on("2026-03-01")
    evaluate(str(dated), tmp_path / "student", config, data=rows)
    on("2026-03-02")
    both = evaluate(str(dated), tmp_path / "student", replace(config, tasks=("gsm8k",)), data=rows)
    prompts = both.table()["prompt"].to_pylist()
    assert {row["task"] for row in both.table().to_pylist()} == {"gsm8k", "sciq"}
    assert all("Today is 01 Mar 2026" in prompt for prompt in prompts)
    later = evaluate(str(dated), tmp_path / "distilled", config, data=rows)
    assert "day 2026-03-02 instead of 2026-03-01" in " ".join(compare({"student": both, "distilled": later}).notes)
