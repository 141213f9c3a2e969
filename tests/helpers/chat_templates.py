"""Chat templates that treat a system message in different ways."""

from tests.helpers.models import CHAT

TURNS = "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] | trim + '<|end|>\n' }}{% endfor %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "system": CHAT,
    "refused": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TURNS,
    "dropped": TURNS.replace("%}{{", "%}{% if m['role'] != 'system' %}{{", 1).replace("}}{%", "}}{% endif %}{%", 1),
    "alternating": ALTERNATE + TURNS,
    "default system": "{% if messages[0]['role'] != 'system' %}{{ '<|start|>system\nBe kind.<|end|>\n' }}{% endif %}"
    + TURNS,
    "in the last user message": "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ '<|start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'user' %}{{ system + '\n' }}{% endif %}"
    "{{ m['content'] + '<|end|>\n' }}{% endfor %}",
}
"""Chat templates by their treatment of a system message."""
THINKING = (
    TURNS + "{%- if add_generation_prompt %}{{- '<|start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
"""Thinks unless `enable_thinking` is false, as Qwen3's does."""
THINKING_BY_DEFAULT = (
    "{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}"
    "{% macro start(m) %}{{ '<|start|>' + m['role'] + ('/think' if enable_thinking else '') + '\n' }}{% endmacro %}"
    "{% for m in messages %}{{ start(m) }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
"""Sets its own default, and reads the keyword in a macro, as SmolLM3's does."""
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ m['content'] | trim + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
"""Begins with the BOS token and refuses system messages, as Gemma2's does."""
TOOL_CALLS = "{% for c in m['tool_calls'] %}{{ '<call>' + c['function']['name'] + '</call>' }}{% endfor %}"
CHATML_TURN = (
    "{{ '<|start|>' + m['role'] + '\n' }}{{ m['content'] or '' }}"
    "{% if m['tool_calls'] %}" + TOOL_CALLS + "{% endif %}{{ '<|end|>\n' }}"
)
PROMPTED = "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
TOOLS = "{% if tools %}{{ '<|start|>tools\n' + tools | tojson + '<|end|>\n' }}{% endif %}"
CONVERSATIONS = {
    "chatml": TOOLS + "{% for m in messages %}" + CHATML_TURN + "{% endfor %}" + PROMPTED,
    "headers": "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\n\n' }}"
    "{{ m['content'] | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}",
    "instructions": "{{ bos_token }}"
    + ALTERNATE
    + "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    "end of text": "{% for m in messages %}" + CHATML_TURN + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% else %}{{ '<|text_end|>' }}{% endif %}",
    "marked": TOOLS + "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|start|>assistant\n' }}"
    "{% generation %}{{ m['content'] or '' }}{% if m['tool_calls'] %}" + TOOL_CALLS + "{% endif %}{{ '<|end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}" + CHATML_TURN + "{% endif %}{% endfor %}" + PROMPTED,
    "thoughts": "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set parts = m['content'].split('</think>') %}"
    "{{ '<|start|>assistant\n' }}{% if loop.index0 > ns.last %}"
    "{{ '<think>\n' + (parts[0].replace('<think>', '').strip() if parts | length > 1 else '') + '\n</think>\n\n' }}"
    "{% endif %}{{ parts[-1].lstrip() + '<|end|>\n' }}{% else %}" + CHATML_TURN + "{% endif %}{% endfor %}" + PROMPTED,
    "opened thought": "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|start|>assistant\n' + m['content'].split('</think>')[-1] + '<|end|>\n' }}{% else %}"
    + CHATML_TURN
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n<think>\n' }}{% endif %}",
}
"""Chat templates by the way in which they write conversations."""
SPECIAL = ("<|head|>", "<|/head|>", "<|text_end|>")
"""Special tokens that they write, besides those of every tiny tokenizer."""
