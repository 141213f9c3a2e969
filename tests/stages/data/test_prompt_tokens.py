"""The ids of a prompt contain an added system message with every chat template."""

from pathlib import Path

import pytest

from tests.helpers.chat_templates import TEMPLATES
from tests.helpers.models import byte_tokenizer
from tsdkd.errors import InputError
from tsdkd.stages.data.prompt_tokens import prompt_token_ids
from tsdkd.stages.data.prompts import Prompts


def written(file: Path, template: str, system: str | None) -> str:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    (prompt,) = Prompts(file, system=system)
    text: str = tokenizer.decode(prompt_token_ids(tokenizer, prompt, None))
    return text


@pytest.mark.parametrize("kind", TEMPLATES)
def test_an_added_system_message_is_read_with_any_template(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "How?"}\n')
    text = written(file, TEMPLATES[kind], "Be brief.")
    assert text.count("Be brief.") == text.count("How?") == 1
    assert "Be brief." not in written(file, TEMPLATES[kind], None)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_system_message_of_a_row_is_read_with_any_template(kind: str, tmp_path: Path) -> None:
    """In place of the added one."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"messages": [{"role": "system", "content": "Own."}, {"role": "user", "content": "How?"}]}\n')
    text = written(file, TEMPLATES[kind], "Be brief.")
    assert (text.count("Own."), text.count("How?"), text.count("Be brief.")) == (1, 1, 0)


def test_a_system_message_that_no_user_message_follows_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"messages": [{"role": "system", "content": "Own."}]}\n')
    with pytest.raises(InputError, match=r"prompts\.jsonl, line 1: .*no user message follows"):
        written(file, TEMPLATES["refused"], None)
    assert "Own." in written(file, TEMPLATES["system"], None)
