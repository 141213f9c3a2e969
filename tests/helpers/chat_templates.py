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
