"""The reasoning suite: sampled responses, thoughts, extraction, stop strings and truncation, on synthetic rows."""

import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from tests.helpers.benchmark_rows import ROWS, doubled
from tests.helpers.models import CHAT, save_tiny_model
from tsdkd.artifacts.reader import Artifact, verify_artifact
from tsdkd.artifacts.schemas import SCHEMAS
from tsdkd.errors import InputError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.eval import stage
from tsdkd.stages.eval.answers import shuffle_choices
from tsdkd.stages.eval.harness import load_tasks
from tsdkd.stages.eval.lm_eval_transformers import HFLM, TransformersModel
from tsdkd.stages.eval.stage import evaluate
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.tokenizers import load_tokenizer
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.results.benchmarks import choose_benchmarks
from tsdkd.stages.results.compare import document_scores

SUITE = tuple(benchmark.name for benchmark in choose_benchmarks(["reasoning"]))
CONFIG = EvalConfig(SUITE, max_new_tokens=150)
Script = Callable[[int, int, str], str]
"""The response to a document's number, the number of the sample and the prompt."""


def play(script: Script, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model responds as in the script, and ends its turn."""
    tokenizer, samples = AutoTokenizer.from_pretrained(model), Counter[str]()

    def respond(self: Any, context: torch.Tensor, max_length: int, stop: list[str], **_: Any) -> torch.Tensor:
        ids = []
        for prompt in tokenizer.batch_decode(context):
            (number,) = re.findall(r"What is (\d+) times 2\?", prompt)
            ids.append(tokenizer(f"{script(int(number), samples[prompt], prompt)}<|end|>").input_ids)
            samples[prompt] += 1
        longest = min(max(map(len, ids)), max_length - context.shape[1])
        padded = [(response + [tokenizer.pad_token_id] * longest)[:longest] for response in ids]
        return torch.cat([context, torch.tensor(padded)], 1)

    monkeypatch.setattr(HFLM, "_model_generate", respond)


def measure(model: Path, output: Path, rows: Path, **settings: Any) -> tuple[Artifact, list[str]]:
    lines: list[str] = []
    observer = SilentObserver()
    observer.info = lines.append  # type: ignore[method-assign]
    return evaluate(str(model), output, replace(CONFIG, **settings), rows, observer=observer), lines


def boxed(number: int, prompt: str) -> str:
    """The right answer, as the prompt asks for it."""
    choice = re.search(rf"\((.)\) {2 * number}\n", prompt)
    return f"\\boxed{{{choice[1] if choice else 2 * number}}}"


RIGHT = {0: "1111", 1: "1000", 2: "0000", 3: "0110"}
"""Which samples of each document are right."""


def test_means_and_pass_at_k_equal_a_hand_calculation(
    student: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right responses of four: 4, 1, 0, 2."""

    def script(number: int, sample: int, prompt: str) -> str:
        right = RIGHT[number][sample % 4] == "1"  # two benchmarks have the same prompts
        return f"Is it \\boxed{{7}}? Answer: {boxed(number, prompt) if right else 'I do not know.'}"

    play(script, student, monkeypatch)
    artifact, lines = measure(student, tmp_path / "r", rows, samples=4)
    means, pass_at_2 = [1, 1 / 4, 0, 1 / 2], [1, 1 / 2, 0, 5 / 6]  # 1 - C(3,2)/C(4,2), 1 - C(2,2)/C(4,2)
    assert list(artifact.manifest.summary) == list(SUITE)
    for name, found in artifact.manifest.summary.items():
        assert found["value"] == pytest.approx(sum(means) / 4), name
        assert found["stderr"] == pytest.approx(sqrt(sum((m - 7 / 16) ** 2 for m in means) / 3 / 4))
        assert found["pass_at"]["2"][0] == pytest.approx(sum(pass_at_2) / 4)
        assert found["pass_at"]["2"][1] == pytest.approx(sqrt(sum((p - 7 / 12) ** 2 for p in pass_at_2) / 3 / 4))
        assert found["pass_at"]["4"] == [pytest.approx(3 / 4), pytest.approx(1 / 4)]
        assert (found["documents"], found["samples"], found["temperature"], found["top_p"]) == (4, 4, 0.6, 0.95)
        assert found["max_new_tokens"] == 150
    assert any("aime24: 43.8 ± 21.3 % of 4 documents (avg@4), pass@4 75.0 %" in line for line in lines)
    table = artifact.table().to_pylist()
    assert len(table) == len({(row["task"], row["document"], row["sample"]) for row in table}) == 5 * 4 * 4
    assert all(row["score"] == float(RIGHT[row["document"]][row["sample"]]) for row in table)
    extracted = {row["task"]: row["extracted"] for row in table if row["document"] == 0}
    assert extracted["aime24"] == "\\boxed{0}"
    assert extracted["gpqa-diamond"] in {"(A)", "(B)", "(C)", "(D)"}


THINKS_UNLESS_TOLD = CHAT.replace(
    "assistant\n' }}", "assistant\n' }}{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
OPENS_A_THOUGHT = CHAT.replace("assistant\n' }}", "assistant\n<think>\n' }}")


def with_template(model: Path, path: Path, template: str) -> Path:
    shutil.copytree(model, path)
    (path / "chat_template.jinja").write_text(template)
    return path


def test_a_thought_is_no_part_of_the_answer(
    student: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same model with thinking on and off, and with a template that opens the thought."""

    def script(number: int, _: int, prompt: str) -> str:
        thought = "Is it \\boxed{7}? Or (A)? The answer is (A).</think>\n\n"
        opened = "" if prompt.rstrip().endswith("<think>") else "<think>\n"
        return ("" if "</think>" in prompt else opened + thought) + f"It is ${2 * number}$: {boxed(number, prompt)}."

    play(script, student, monkeypatch)
    templates = {
        "on": THINKS_UNLESS_TOLD,
        "off": "{% set enable_thinking = false %}" + THINKS_UNLESS_TOLD,
        "opened": OPENS_A_THOUGHT,
    }
    responses = {}
    for name, template in templates.items():
        artifact, _ = measure(
            with_template(student, tmp_path / name, template), tmp_path / f"r-{name}", rows, samples=1
        )
        assert {found["value"] for found in artifact.manifest.summary.values()} == {1}
        assert {found["truncated"] for found in artifact.manifest.summary.values()} == {0}
        responses[name] = [row["response"] for row in artifact.table().to_pylist()]
    assert all(response.startswith("<think>") for response in responses["on"])
    assert not any("think>" in response for response in responses["off"])
    assert all(response.startswith("Is it") for response in responses["opened"])


@pytest.mark.parametrize("template", [THINKS_UNLESS_TOLD, OPENS_A_THOUGHT])
def test_an_unfinished_thought_is_wrong_and_counts_as_truncated(
    template: str, student: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(number: int, _: int, prompt: str) -> str:
        return ("" if template == OPENS_A_THOUGHT else "<think>") + f"So it is {boxed(number, prompt)}."

    play(script, student, monkeypatch)
    model = with_template(student, tmp_path / "m", template)
    artifact, lines = measure(model, tmp_path / "r", rows, samples=2, tasks=("aime24", "gpqa-diamond"))
    for found in artifact.manifest.summary.values():
        assert (found["value"], found["truncated"]) == (0, 8)
    assert all(row["extracted"] == "" and "boxed" in row["response"] for row in artifact.table().to_pylist())
    assert any("8 responses truncated" in line for line in lines)


def test_thoughts_are_no_answers_to_the_ten(
    student: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that never writes a marker is scored as before: the last number counts."""
    model = with_template(student, tmp_path / "m", OPENS_A_THOUGHT)
    for name, end, value in (("finished", "</think>", 1), ("unfinished", "", 0)):
        play(lambda n, *_, end=end: f"It is {2 * n}. Or 7?{end} It is {2 * n}.", model, monkeypatch)
        artifact, _ = measure(model, tmp_path / name, rows, tasks=("gsm8k",))
        found = artifact.manifest.summary["gsm8k"]
        assert (found["value"], found["truncated"], found["samples"]) == (value, 6 * (1 - value), 1)


def test_stop_strings_do_not_cut_a_response_that_restates_its_question(
    student: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a chat template."""
    play(lambda n, _, p: f"Question: {doubled(n)}\n\nAnswer: {boxed(n, p)}", student, monkeypatch)
    for chat in (True, False):
        artifact, _ = measure(student, tmp_path / f"r{chat}", rows, samples=1, chat_template=chat)
        for found in artifact.manifest.summary.values():
            assert (found["value"], found["stopped_by"]) == (1, {})


def test_the_limit_of_a_response_may_be_raised(
    student: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thought takes more than the 512 tokens of gsm8k."""
    limits = []

    def respond(self: Any, context: torch.Tensor, max_length: int, stop: list[str], **_: Any) -> torch.Tensor:
        limits.append(max_length - context.shape[1])
        return torch.cat([context, context[:, :1]], 1)

    monkeypatch.setattr(HFLM, "_model_generate", respond)
    monkeypatch.setattr(TransformersModel, "max_length", 4096)
    measure(student, tmp_path / "r", rows, tasks=("gsm8k",), max_new_tokens=2048, limit=1)
    assert limits == [2048]


def test_truncated_responses_are_counted(student: Path, rows: Path, tmp_path: Path) -> None:
    artifact, lines = measure(student, tmp_path / "r", rows, samples=2, max_new_tokens=2, tasks=("aime25",))
    table = artifact.table().to_pylist()
    truncated = sum(row["truncated"] for row in table)
    assert 0 < truncated <= len(table) == 8
    assert artifact.manifest.summary["aime25"]["truncated"] == truncated
    assert any(f"{truncated} responses truncated at their limit" in line for line in lines)


def sampled(model: Path, output: Path, rows: Path, **settings: Any) -> list[list[str]]:
    """The responses by document."""
    settings = {"tasks": ("amc23",), "max_new_tokens": 8, "samples": 3, "temperature": 1.0} | settings
    artifact, _ = measure(model, output, rows, **settings)
    table = artifact.table().to_pylist()
    return [[row["response"] for row in table if row["document"] == number] for number in range(4)]


def test_the_seed_decides_the_samples(student: Path, rows: Path, tmp_path: Path) -> None:
    """Not the batch, not the other documents, not the number of samples; no two samples share random numbers."""
    first = sampled(student, tmp_path / "a", rows)
    assert all(len(set(responses)) == 3 for responses in first)
    assert sampled(student, tmp_path / "b", rows, batch_size=5) == first
    assert sampled(student, tmp_path / "c", rows, samples=2, limit=2)[:2] == [responses[:2] for responses in first[:2]]
    other = sampled(student, tmp_path / "d", rows, seed=1)
    assert not {r for responses in other for r in responses} & {r for responses in first for r in responses}


def test_a_benchmark_has_the_same_samples_after_another_one(student: Path, rows: Path, tmp_path: Path) -> None:
    """Their prompts are the same here: an interrupted suite resumes with the bytes of an uninterrupted one."""
    settings: dict[str, Any] = {"samples": 2, "limit": 2, "max_new_tokens": 5}
    together, _ = measure(student, tmp_path / "together", rows, tasks=("aime24", "aime25"), **settings)
    measure(student, tmp_path / "apart", rows, tasks=("aime24",), **settings)
    apart, _ = measure(student, tmp_path / "apart", rows, tasks=("aime24", "aime25"), **settings)
    for file in ("aime24.parquet", "aime25.parquet"):
        assert (together.path / file).read_bytes() == (apart.path / file).read_bytes()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_benchmark_that_is_cut_within_its_samples_ends_with_the_same_bytes(
    student: Path,
    rows: Path,
    tmp_path: Path,
    contents: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
) -> None:
    """In the first or the second of two benchmarks, each of two batches."""
    settings = {"tasks": ("aime24", "amc23"), "samples": 2, "limit": 2, "max_new_tokens": 5, "batch_size": 2}
    measure(student, tmp_path / "whole", rows, **settings)
    generate, batches = TransformersModel._model_generate, iter(range(9))

    def interrupted(self: TransformersModel, *given: Any, **more: Any) -> torch.Tensor:
        if next(batches) == batch:
            raise KeyboardInterrupt
        return generate(self, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersModel, "_model_generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure(student, tmp_path / "cut", rows, **settings)
    assert len(list((tmp_path / "cut").glob("*.parquet"))) == batch // 2
    measure(student, tmp_path / "cut", rows, **settings)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_sampled_tokens_have_the_probabilities_of_the_nucleus() -> None:
    from tsdkd.stages.engines.transformers_engine import nucleus_logits
    from tsdkd.stages.eval.seeded_sampling import SeededSampling

    logits, count = torch.tensor([2.0, 1.5, 1.0, 0.0, -3.0]), 20_000
    sampler = SeededSampling(range(count), temperature=0.7, top_p=0.9, device=torch.device("cpu"))
    frequencies = sampler(torch.empty(0), logits.expand(count, -1)).argmax(-1).bincount(minlength=5) / count
    expected = nucleus_logits((logits / 0.7).unsqueeze(0), 0.9)[0].softmax(-1)
    assert (expected == 0).tolist() == [False, False, False, True, True]
    torch.testing.assert_close(frequencies, expected, atol=4 * 0.5 / count**0.5, rtol=0)


def test_markers_of_thoughts_stay_where_they_are_special_tokens(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "m", seed=1, extra=("[THINK]", "[/THINK]"))
    model = TransformersModel(load_model(str(path)), 512, None, [])
    ids = load_tokenizer(str(path))("<|start|>[THINK]a b[/THINK]c<|end|>").input_ids
    assert model.tok_decode(ids) == "[THINK]a b[/THINK]c"
    assert model.tok_decode(ids[0], skip_special_tokens=False) == "<|start|>"


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        (
            {"tasks": ("gsm8k", "sciq", "musr"), "temperature": 0.6},
            r"Multiple choice samples no responses \(sciq, musr\), but --temperature 0.6 is given",
        ),
        ({"tasks": ("sciq",), "samples": 4}, "--samples 4 is given"),
        ({"tasks": ("gsm8k", "aime24"), "samples": 4}, r"Greedy .* \(gsm8k\), but --samples 4 is given"),
        ({"temperature": 0.0, "top_p": 0.9}, r"Greedy .* \(aime24, .*\), but --top-p 0.9 is given"),
    ],
)
def test_sampling_that_a_benchmark_cannot_follow_is_refused(
    settings: dict[str, Any], cause: str, student: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=cause):
        measure(student, tmp_path / "r", rows, **settings)
    assert not (tmp_path / "r").exists()


def test_a_temperature_of_0_is_greedy_with_one_response(student: Path, rows: Path, tmp_path: Path) -> None:
    artifact, _ = measure(student, tmp_path / "r", rows, temperature=0.0, tasks=("aime24",), max_new_tokens=4)
    found = artifact.manifest.summary["aime24"]
    assert (found["temperature"], found["samples"], len(artifact.table())) == (0, 1, 4)


def test_results_of_earlier_versions_are_read_and_extended(
    student: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no numbers of samples."""
    settings = {"limit": 2, "samples": 1, "max_new_tokens": 4}
    monkeypatch.setattr(stage, "schema_of", lambda kind, _: SCHEMAS[kind])
    measure(student, tmp_path / "r", rows, tasks=("aime25",), **settings)
    monkeypatch.undo()
    artifact, _ = measure(student, tmp_path / "r", rows, tasks=("amc23",), **settings)
    verify_artifact(tmp_path / "r")
    assert (
        artifact.table(["sample"])["sample"].to_pylist() == artifact.table()["sample"].to_pylist() == [None, None, 0, 0]
    )
    assert len(document_scores(artifact, "aime25")) == 2


def test_gated_data_needs_a_token_or_a_copy(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message comes before a model is loaded."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match="gated dataset Idavidrein/gpqa, and there is no hub token") as caught:
        evaluate(str(student), tmp_path / "r", EvalConfig(("gpqa-diamond",)))
    assert "hf auth login" in caught.value.remedy
    assert "copy as gpqa/ with --data" in caught.value.remedy
    assert not (tmp_path / "r").exists()


def test_the_error_for_a_missing_column_says_which_columns_are_needed(tmp_path: Path) -> None:
    (tmp_path / "math500").mkdir()
    (tmp_path / "math500" / "test.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    with pytest.raises(InputError, match="solution") as caught:
        load_tasks(*choose_benchmarks(["math-500"]), tmp_path, None)
    assert "the split test, with the columns of the hub's dataset" in caught.value.remedy


def test_choices_have_the_same_order_in_every_run() -> None:
    _, splits = ROWS["gpqa"]

    def orders(seed: int) -> list[list[str]]:
        random.seed(seed)
        return [document["choices"] for document in shuffle_choices(Dataset.from_list(splits["train"]))]

    assert orders(1) == orders(2)
    assert all(str(2 * i) in choices for i, choices in enumerate(orders(1)))
    assert len({choices.index(str(2 * i)) for i, choices in enumerate(orders(1))}) > 1


def test_a_context_without_space_for_the_budget_is_refused(student: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="aime24 generates up to 32,768 tokens, but the context has 512"):
        evaluate(str(student), tmp_path / "r", EvalConfig(("aime24",)), rows)
    with pytest.raises(InputError, match=r"A prompt of 1\d\d tokens and 450 new tokens exceed") as caught:
        evaluate(str(student), tmp_path / "r", EvalConfig(("aime24",), max_new_tokens=450), rows)
    (limit,) = re.findall(r"at most (\d+)", caught.value.remedy)
    config = EvalConfig(("aime24",), max_new_tokens=int(limit), samples=1, limit=1)
    assert evaluate(str(student), tmp_path / "r", config, rows).manifest.summary["aime24"]["prompts_truncated"] == 0
