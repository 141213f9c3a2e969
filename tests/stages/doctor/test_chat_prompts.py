"""Findings from chat templates and prompts."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.chat_templates import TEMPLATES
from tests.helpers.models import CHAT, byte_tokenizer
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.prompts import Prompt
from tsdkd.stages.doctor import chat_prompts as checks
from tsdkd.stages.doctor.model_files import ModelFiles, read_model_files

Pair = tuple[ModelFiles, ModelFiles]
PROMPTS = [Prompt(str(i), "", [{"role": "user", "content": "Count to " + "many " * i}]) for i in range(3)]
THINKING = (
    CHAT + "{% if add_generation_prompt and not enable_thinking | default(true) %}<think>\n\n</think>\n\n{% endif %}"
)
THINKING_OFF = (
    CHAT + "{% if add_generation_prompt and not enable_thinking | default(false) %}<think>\n\n</think>\n\n{% endif %}"
)
OPENED = CHAT + "{% if add_generation_prompt %}<think>\n{% endif %}"


@pytest.fixture(scope="module")
def files(student: Path) -> ModelFiles:
    return read_model_files("student", str(student), None)


def pair_with(files: ModelFiles, student: str | None, teacher: str | None) -> Pair:
    """Two models with these chat templates."""
    models = []
    for role, template in (("student", student), ("teacher", teacher)):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        models.append(replace(files, role=role, spec=replace(files.spec, tokenizer=tokenizer)))
    return models[0], models[1]


def test_chat_templates_of_both_models(files: ModelFiles) -> None:
    """A base student without a template is refused; a base teacher reads the student's."""
    assert checks.check_chat_template(pair_with(files, CHAT, CHAT)).status == "ok"
    other = checks.check_chat_template(pair_with(files, CHAT, TEMPLATES["refused"]))
    assert (other.status, other.values) == ("look", {"equal": False, "teacher_has_one": True})
    assert "The teacher has no template." in checks.check_chat_template(pair_with(files, CHAT, None)).reason
    with pytest.raises(InputError, match="The student has no chat template") as refusal:
        checks.check_chat_template(pair_with(files, None, CHAT))
    assert "--chat-template plain" in refusal.value.remedy


@pytest.mark.parametrize(
    ("template", "keeps", "adds"),
    [
        ("system", True, False),
        ("refused", False, False),
        ("dropped", False, False),
        ("default system", True, True),
        ("in the last user message", True, False),
    ],
)
def test_system_messages(template: str, keeps: bool, adds: bool, files: ModelFiles) -> None:
    found = checks.check_system_role(pair_with(files, TEMPLATES[template], CHAT))
    assert found.values["keeps"] == {"student": keeps, "teacher": True}
    assert found.values["adds"] == {"student": adds, "teacher": False}
    assert found.status == ("ok" if keeps and not adds else "look")
    assert ("one of its own before a prompt without one" in found.reason) == adds


@pytest.mark.parametrize(
    ("own", "others", "modes", "status"),
    [
        (CHAT, CHAT, ("none", "none"), "ok"),
        (THINKING, THINKING, ("on", "on"), "look"),
        (THINKING_OFF, THINKING_OFF, ("off", "off"), "ok"),
        (OPENED, OPENED, ("opened", "opened"), "look"),
        (CHAT, THINKING, ("none", "on"), "look"),
        (CHAT, None, ("none", "none"), "ok"),
    ],
)
def test_thinking_modes(own: str, others: str | None, modes: tuple[str, str], status: str, files: ModelFiles) -> None:
    found = checks.check_thinking(pair_with(files, own, others))
    assert (found.values["student"], found.values["teacher"]) == modes
    assert found.status == status
    assert ("both read prompts in the student's template" in found.reason) == (modes[0] != modes[1])
    assert status == "ok" or "--chat-template-kwargs" in found.remedy


@pytest.mark.parametrize(
    ("template", "count", "status"),
    [(CHAT, 1, "ok"), ("{{ bos_token }}" + CHAT, 2, "look"), ("{{ messages[0]['content'] }}", 0, "ok")],
)
def test_begin_tokens(template: str, count: int, status: str, files: ModelFiles) -> None:
    found = checks.check_begin_tokens(pair_with(files, template, CHAT)[0])
    assert (found.values["count"], found.status) == (count, status)


def test_a_template_without_the_begin_token_that_plain_text_gets(files: ModelFiles) -> None:
    from tokenizers.processors import TemplateProcessing

    model = pair_with(files, "{{ messages[0]['content'] }}", CHAT)[0]
    model.spec.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 256)]
    )
    found = checks.check_begin_tokens(model)
    assert (found.status, found.values["count"], found.values["added_to_text"]) == ("look", 0, True)


def test_prompts_that_are_skipped_are_counted(files: ModelFiles) -> None:
    pair, config = pair_with(files, CHAT, CHAT), GenerateConfig(max_prompt_tokens=35)
    sampled = checks.write_prompts(pair, PROMPTS, config)
    assert (len(sampled.ids), sampled.too_long) == (2, 1)
    found = checks.check_prompts(7, Counter(empty=2), sampled, config, joined=3)
    assert "The system messages of 3 prompts join the first user message." in found.reason
    assert (found.status, found.values["skipped"]) == ("look", {"empty": 2})
    assert "2 rows are empty, 33% of the sampled prompts are too long" in found.reason
    with pytest.raises(InputError, match="All 3 sampled prompts are longer than 5 tokens"):
        checks.write_prompts(pair, PROMPTS, replace(config, max_prompt_tokens=5))


def test_prompts_in_both_chat_templates(files: ModelFiles) -> None:
    def rendering(teacher: str | None, prompts: list[Prompt] = PROMPTS) -> Any:
        pair = pair_with(files, CHAT, teacher)
        return checks.check_rendering(pair, checks.write_prompts(pair, prompts, GenerateConfig()))

    assert rendering(CHAT).values == {"different": 0, "compared": 3}
    trimmed = rendering(TEMPLATES["dropped"])  # another program, which differs in trailing spaces and the turn's start
    assert (trimmed.status, trimmed.values["different"]) == ("look", 3)
    assert rendering(None).status == "ok"
    written = [Prompt("a", "", [{"role": "user", "content": "<|start|>user\nHello<|end|>\n"}])]
    assert "1 contain the BOS token" in rendering(CHAT, written).reason


def test_contexts(files: ModelFiles) -> None:
    """A sampled prompt that exceeds a context stops; an allowed one that would is named."""
    pair = pair_with(files, CHAT, CHAT)
    sampled = checks.write_prompts(pair, PROMPTS, GenerateConfig())
    fits = GenerateConfig(max_prompt_tokens=100, max_new_tokens=412)
    assert checks.check_context(pair, sampled, fits).status == "ok"
    found = checks.check_context(pair, sampled, replace(fits, max_prompt_tokens=101))
    assert (found.status, found.remedy) == ("look", "Give --max-prompt-tokens 100.")
    with pytest.raises(InputError, match="reads 512"):
        checks.check_context(pair, sampled, replace(fits, max_new_tokens=500))
