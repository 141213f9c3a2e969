"""Prompts and responses in a chat template: the model reads every instruction, and no stop string cuts its response."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationConfig

from tests.helpers.chat_templates import NO_SYSTEM, TEMPLATES
from tests.helpers.models import CHAT
from tests.helpers.tasks import tasks_of
from tsdkd.artifacts.reader import Artifact
from tsdkd.errors import InputError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.eval import harness
from tsdkd.stages.eval.lm_eval_transformers import HFLM, TransformersModel
from tsdkd.stages.eval.response_tracking import TrackedResponse
from tsdkd.stages.eval.stage import evaluate
from tsdkd.stages.models.load import load_model
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.results.benchmarks import BENCHMARKS, PAPER_BENCHMARKS

Messages = list[dict[str, Any]]


class RecordingModel(TransformersModel):
    """Records the messages that lm-eval has for each prompt, and every prompt that is sent; responds with nothing."""

    def __init__(self, directory: Path) -> None:
        super().__init__(load_model(str(directory)), 512, None, [])
        self.messages: dict[str, Messages] = {}
        self.sent: list[str] = []

    def apply_chat_template(self, chat_history: Messages, add_generation_prompt: bool = True) -> str:
        messages = [dict(message) for message in chat_history]
        text = super().apply_chat_template(chat_history, add_generation_prompt)
        self.messages[text] = messages
        return text

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[TrackedResponse]:
        self.sent += [request.args[0] for request in requests]
        return [TrackedResponse.of("", "")] * len(requests)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.sent += [request.args[0] for request in requests]
        return [(0.0, False)] * len(requests)


@pytest.mark.parametrize("name", PAPER_BENCHMARKS)
def test_every_part_of_a_prompt_is_sent(name: str, student: Path, real_data: Path, punkt: None) -> None:
    """The task's instructions, the shots and the document, in templates with and without a system role."""
    name = {"gsm-plus": "gsm-plus:mini"}.get(name, name)
    model, tasks = RecordingModel(student), tasks_of(name)

    def run(template: str | None) -> list[str]:
        model.sent.clear()
        model.tokenizer.chat_template = template
        for task in tasks.values():
            task.set_fewshot_seed(1)
        chat = template is not None
        harness.run_benchmark(model, "m", BENCHMARKS[name], tasks, len(tasks), chat, SilentObserver())
        return [*dict.fromkeys(model.sent)]

    conversations = [model.messages[prompt] for prompt in run(TEMPLATES["refused"])]
    assert len(conversations) == len(tasks)
    described = {str(task.config.description).strip() for task in tasks.values() if task.config.description}
    assert {
        messages[0]["content"].strip() for messages in conversations if messages[0]["role"] == "system"
    } == described
    assert bool(described) == (name in {"mmlu-pro-math", "mmlu-stem", "bbh"})
    for messages in conversations:
        roles = tuple(message["role"] for message in messages if message["role"] != "system")
        assert roles == BENCHMARKS[name].roles
        for template in TEMPLATES.values():
            model.tokenizer.chat_template = template
            text = model.apply_chat_template(messages, add_generation_prompt=messages[-1]["role"] == "user")
            _require_parts(text, messages)
    for text, messages in zip(run(None), conversations, strict=True):
        _require_parts(text, messages)


def _require_parts(text: str, messages: Messages) -> None:
    rest = text
    for message in messages:
        if message["role"] == "system":  # before, or within another message
            assert message["content"].strip() in text
        else:
            _, found, rest = rest.partition(message["content"].strip())
            assert found


def test_a_template_that_drops_the_shots_is_refused(student: Path, rows: Path, tmp_path: Path) -> None:
    model = shutil.copytree(student, tmp_path / "m")
    (model / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    with pytest.raises(InputError, match="drops messages") as caught:
        evaluate(str(model), tmp_path / "r", replace(CONFIG, tasks=("sciq", "gsm8k")), rows)
    assert "--no-chat" in caught.value.remedy
    assert not (tmp_path / "r").exists()


CONFIG = EvalConfig(("gsm8k", "mbpp"), max_new_tokens=200, max_length=2048)
Script = Callable[[str], str]


def restated(prompt: str) -> str:
    """The right response to the document at the end of a prompt, with the document before it."""
    if found := re.findall(r"What is (\d+) times 2\?", prompt):
        return (
            f"Question: What is {found[-1]} times 2?\nIt is twice the number.\n\nQ: So?\nAnswer: {2 * int(found[-1])}"
        )
    (number,) = re.findall(r"to add (\d+)", prompt)
    return f"Here is the code:\n```\ndef add(n):\n    return n + {number}\n```\nIt adds."


@pytest.fixture
def scripted(student: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The model responds as in `restated`; the list receives the end tokens that it generates with."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    end_ids: list[Any] = []

    def respond(self: Any, context: torch.Tensor, max_length: int, stop: list[str], **_: Any) -> torch.Tensor:
        end_ids.append(self.model.generation_config.eos_token_id)
        responses = [restated(prompt) for prompt in tokenizer.batch_decode(context)]
        ids = [tokenizer(f"{response}<|end|>").input_ids for response in responses]
        longest = max(map(len, ids))
        padded = [response + [tokenizer.pad_token_id] * (longest - len(response)) for response in ids]
        return torch.cat([context, torch.tensor(padded)], 1)

    monkeypatch.setattr(HFLM, "_model_generate", respond)
    return end_ids


def measure(model: Path, rows: Path, output: Path, chat: bool) -> tuple[Artifact, list[str]]:
    lines: list[str] = []
    observer = SilentObserver()
    observer.info = lines.append  # type: ignore[method-assign]
    config = replace(CONFIG, chat_template=chat)
    return evaluate(str(model), output, config, rows, observer=observer, allow_code_execution=True), lines


def test_a_chat_response_that_restates_its_prompt_is_not_cut(
    scripted: list[Any], student: Path, rows: Path, tmp_path: Path
) -> None:
    """Without a chat template, lm-eval's stop strings cut it; then the result says so."""
    chat, _ = measure(student, rows, tmp_path / "chat", chat=True)
    for name in CONFIG.tasks:
        assert chat.manifest.summary[name]["value"] == 1
        assert chat.manifest.summary[name]["stopped_by"] == {}
        assert chat.manifest.summary[name]["truncated"] == 0
    plain, lines = measure(student, rows, tmp_path / "plain", chat=False)
    assert plain.manifest.summary["gsm8k"]["value"] == 0
    assert plain.manifest.summary["gsm8k"]["stopped_by"] == {"Question:": 6}
    assert plain.manifest.summary["mbpp"]["stopped_by"] == {"\n```\n": 4}
    assert any("gsm8k: 0.0" in line and "ended by a stop string: 'Question:' 6" in line for line in lines)


def test_the_end_of_a_turn_ends_a_chat_response(scripted: list[Any], student: Path, rows: Path, tmp_path: Path) -> None:
    """Also of a base model whose own end token is another one."""
    model = shutil.copytree(student, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = "<|start|>"
    tokenizer.save_pretrained(model)
    (model / "chat_template.jinja").write_text(CHAT)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id).save_pretrained(model)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for chat in (True, False):
        measure(model, rows, tmp_path / f"r{chat}", chat)
        assert (end in scripted.pop()) == chat


@pytest.mark.parametrize(("template", "count"), [(NO_SYSTEM, 1), ("{{ messages[-1]['content'] }}", 0), (None, 1)])
def test_a_prompt_has_the_bos_tokens_of_its_chat_template(
    template: str | None, count: int, student: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer adds one to text, and only to text: transformers' own chat path adds no special tokens."""
    model = shutil.copytree(student, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(model)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|start|> $A", special_tokens=[("<|start|>", bos)])
    tokenizer.save_pretrained(model)
    if template:
        (model / "chat_template.jinja").write_text(template)
    sent: list[list[int]] = []

    def respond(self: Any, context: torch.Tensor, max_length: int, stop: list[str], **_: Any) -> torch.Tensor:
        sent.extend(context.tolist())
        return torch.cat([context, torch.full((len(context), 1), tokenizer.eos_token_id)], 1)

    def score(self: Any, requests: list[Any], *_: Any, **__: Any) -> list[tuple[float, bool]]:
        sent.extend([*context, *continuation] for _, context, continuation in requests)
        return [(0.0, False)] * len(requests)

    monkeypatch.setattr(HFLM, "_model_generate", respond)
    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", score)
    monkeypatch.setattr("tsdkd.stages.eval.chat_format.require_turns", lambda *_: None)
    config = replace(CONFIG, tasks=("gsm8k", "sciq"), limit=1, max_new_tokens=4, chat_template=bool(template))
    evaluate(str(model), tmp_path / "r", config, rows)
    assert len(sent) == 1 + 4
    assert [ids[:2].count(bos) for ids in sent] == [count] * 5


@pytest.mark.parametrize(("name", "stops"), [("gsm8k", []), ("mbpp:base", ["[DONE]"]), ("bbh:direct", ["\n\n"])])
def test_stop_strings_in_a_chat_template(name: str, stops: list[str], real_data: Path) -> None:
    chat, plain = (
        harness.load_tasks(BENCHMARKS[name], real_data / "benchmarks", None, chat=chat) for chat in (True, False)
    )
    for task in chat:
        assert chat[task].config.generation_kwargs["until"] == stops
        assert plain[task].config.generation_kwargs["until"] != []
