"""The chat format of a run: a tokenizer's template, replaced and given defaults for its keywords.

All that renders prompts reads the tokenizer's template, so that a changed template is the whole format.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import meta, nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from tsdkd.artifacts.locks import register_input
from tsdkd.artifacts.regular_files import MAX_TEXT, require_regular_file
from tsdkd.errors import InputError
from tsdkd.stages.config.chat import PLAIN, RESERVED, ChatConfig
from tsdkd.stages.models.chat_rendering import bounded_rendering, require_compilable

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% if message['tool_calls'] %}{{ raise_exception('the plain format has no tool calls') }}{% endif %}"
    "{{ 'Assistant:\\n' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('the plain format has the roles system, user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
"""The plain format: a system message without a heading, headings for user and assistant, and the end token after an
assistant's message. A tokenizer that begins plain text with its BOS token has it here too."""
_HEAD, _TAIL = "{# chat-template-kwargs ", " #}"
"""Around the JSON of the defaults, at the start of a template's first line."""


def set_chat_format(tokenizer: PreTrainedTokenizerBase, chat: ChatConfig) -> None:
    """Give a tokenizer the template of a chat format. An unset format changes nothing.

    Raises InputError for a file that cannot be read, and for a keyword that the template does not read.
    """
    if chat.template == PLAIN:
        tokenizer.chat_template = _plain_template(tokenizer)
    elif chat.file:
        tokenizer.chat_template = _read_template(Path(chat.file))
    if not chat.keywords:
        return
    templates = tokenizer.chat_template
    if not templates:
        raise InputError(
            f"The model has no chat template that reads {', '.join(chat.keywords)}.",
            "Leave out --chat-template-kwargs, or name a template with --chat-template.",
        )
    _require_keywords(tokenizer, chat.keywords)
    with_defaults = partial(template_with_defaults, keywords=chat.keywords)
    tokenizer.chat_template = (
        {name: with_defaults(template) for name, template in templates.items()}
        if isinstance(templates, dict)
        else with_defaults(templates)
    )


def reads_keywords(tokenizer: PreTrainedTokenizerBase, chat: ChatConfig) -> bool:
    """Whether the tokenizer's template, or the format's own, can have this format."""
    return bool(chat.template) or not chat.keywords.keys() - _read_names(tokenizer)


def template_with_defaults(template: str, keywords: dict[str, Any]) -> str:
    """A template that takes these values for keywords that its caller leaves out.

    Earlier defaults stay, and new ones of the same name replace them. Without defaults it writes the same bytes.
    """
    own, earlier = _without_defaults(template), template_defaults(template)
    defaults = dict(sorted({**earlier, **keywords}.items()))
    if not defaults:
        return own
    assignments = (
        f"{{% if {name} is not defined %}}{{% set {name} = {_jinja_literal(value)} %}}{{% endif %}}"
        for name, value in defaults.items()
    )
    # Chat templates are rendered with trim_blocks: the newline after the last block is not written.
    return f"{_HEAD}{json.dumps(defaults).replace('#', chr(92) + 'u0023')}{_TAIL}{''.join(assignments)}\n{own}"


def template_defaults(template: str | dict[str, str] | None) -> dict[str, Any]:
    """The defaults that `template_with_defaults` gave to a template."""
    text = template.get("default", "") if isinstance(template, dict) else template or ""
    if text.startswith(_HEAD):
        try:
            defaults, _ = json.JSONDecoder().raw_decode(text, len(_HEAD))
        except ValueError:
            return {}
        return defaults if isinstance(defaults, dict) else {}
    return {}


def _without_defaults(template: str) -> str:
    return template.partition("\n")[2] if template_defaults(template) else template


def _jinja_literal(value: Any) -> str:
    """A JSON value as jinja writes it; its string escapes are JSON's, but a character beyond 16 bits is one escape."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_jinja_literal(k)}: {_jinja_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_jinja_literal, value)) + "]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False)


def _require_keywords(tokenizer: PreTrainedTokenizerBase, keywords: dict[str, Any]) -> None:
    names = _read_names(tokenizer)
    special = [name for name in keywords if name in tokenizer.special_tokens_map]
    unread = [name for name in keywords if name not in names]
    if special:
        raise InputError(
            f"--chat-template-kwargs has the keyword {special[0]}.", "Leave it out: the tokenizer sets it."
        )
    if unread:
        listed = ", ".join(sorted(names - _own_names(tokenizer) - set(tokenizer.special_tokens_map))) or "none"
        raise InputError(
            f"The chat template does not read the keyword {', '.join(unread)} of --chat-template-kwargs.",
            f"Leave it out, or correct its name; the template reads: {listed}.",
        )


def _read_names(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The variables that a tokenizer's templates read and no prompt sets."""
    return set().union(*map(meta.find_undeclared_variables, _parse_templates(tokenizer))) - RESERVED


def _own_names(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The variables that a tokenizer's templates set themselves, without asking whether the caller sets them."""
    set_here, asked = set[str](), set[str]()
    for template in _parse_templates(tokenizer):
        set_here |= {name.name for name in template.find_all(nodes.Name) if name.ctx == "store"}
        tests = (test for test in template.find_all(nodes.Test) if test.name in {"defined", "undefined"})
        asked |= {test.node.name for test in tests if isinstance(test.node, nodes.Name)}
    return set_here - asked


def _parse_templates(tokenizer: PreTrainedTokenizerBase) -> Iterator[nodes.Template]:
    templates = tokenizer.chat_template or ""
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        require_compilable(template)
        with bounded_rendering():
            yield _compile_jinja_template(template).environment.parse(_without_defaults(template))


def _plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise InputError(
            "The plain chat format ends a response with the end token, and the tokenizer has none.",
            "Set eos_token in its tokenizer_config.json, or name a template with --chat-template FILE.",
        )
    bos = tokenizer.bos_token_id
    begins = bos is not None and list(tokenizer("User:").input_ids[:1]) == [bos]
    return "{{ bos_token }}" * begins + PLAIN_TEMPLATE


def _read_template(file: Path) -> str:
    missing = f"Name a jinja file, or {PLAIN}, the format for models without a chat template."
    require_regular_file(file, "chat template", MAX_TEXT, missing)
    register_input(file)
    try:
        template = file.read_text(encoding="utf-8")
    except ValueError:
        raise InputError(f"The chat template {file} is not UTF-8 text.", "Name a jinja file.") from None
    if not template.strip():
        raise InputError(f"The chat template {file} is empty.", "Name a jinja file, or leave out --chat-template.")
    require_compilable(template)
    return template
