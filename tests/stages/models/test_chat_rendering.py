"""A chat template that does not end, or grows without bound, is refused in bounded time and memory."""

import resource
import signal
from pathlib import Path

import pytest

from tests.helpers.commands import refuse
from tests.helpers.models import byte_tokenizer, save_tiny_model
from tests.helpers.prompts import write_prompts
from tsdkd.errors import InputError
from tsdkd.stages.models import chat_rendering
from tsdkd.stages.models.chat import require_turns
from tsdkd.stages.models.tokenizers import chat_token_ids, require_chat_template

RANGE = "range(99999)"
TEMPLATES = {
    "loops": (f"{{% for i in {RANGE} %}}{{% for j in {RANGE} %}}{{% endfor %}}{{% endfor %}}", "does not end within"),
    "power": ("{{ 9 ** (9 ** 9) }}", "does not end within|needs more than"),
    "range": ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
    "repetition": ("{{ 'a' * 10 ** 12 }}", "needs more than"),
    "growth": (
        "{% set n = namespace(t='ab') %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
        "needs more than",
    ),
    "output": (f"{{% for i in {RANGE} %}}{{{{ 'a' * 99999 }}}}{{% endfor %}}", "needs more than|writes"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_an_endless_template_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template, cause = TEMPLATES[kind]
    monkeypatch.setattr(chat_rendering, "MEMORY", 1 << 28)
    if "does not end" in cause:
        monkeypatch.setattr(chat_rendering, "SECONDS", 0.3)  # a slow machine may need longer to use the memory
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(InputError, match=cause):
        chat_token_ids(tokenizer, [{"role": "user", "content": "a"}])
    with pytest.raises(InputError):
        require_turns(tokenizer, ("user",))
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    assert signal.getsignal(signal.SIGVTALRM) == handler
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0


def test_a_syntax_error_names_the_template(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", seed=1)
    (model / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    prompts = write_prompts(tmp_path / "p.jsonl", 1)
    cause, remedy = refuse("generate", "--student", model, "--prompts", prompts, "--run", tmp_path / "run")
    assert cause.startswith("The chat template is not a jinja template, line 2 (")
    assert "chat template" in remedy
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "(" * 9999 + "{{ " + "(" * 9999
    with pytest.raises(InputError, match="not a jinja template"):
        require_chat_template(tokenizer)


def test_only_the_start_of_a_long_text_becomes_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """These ids are the first ids of the whole text."""
    tokenizer = byte_tokenizer()
    read: list[int] = []
    call = type(tokenizer).__call__

    def tokenize(self: object, text: str, **settings: object) -> object:
        read.append(len(text))
        return call(self, text, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(type(tokenizer), "__call__", tokenize)
    messages = [{"role": "user", "content": "word " * 100_000}]
    ids = chat_token_ids(tokenizer, messages, max_tokens=50)
    assert 50 < len(ids) < 1000
    assert max(read) < 1000
    assert ids == chat_token_ids(tokenizer, messages)[: len(ids)]
    short = [{"role": "user", "content": "word"}]
    assert chat_token_ids(tokenizer, short, max_tokens=50) == chat_token_ids(tokenizer, short)


def test_a_long_text_with_few_tokens_is_read_whole() -> None:
    """A normaliser may remove what the length counts."""
    from tokenizers import normalizers

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    messages = [{"role": "user", "content": "x" * 5000 + "end"}]
    assert "end" in tokenizer.decode(chat_token_ids(tokenizer, messages, max_tokens=50))
