"""Models with Python code of their own are refused without a question on stdin."""

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tsdkd.errors import InputError
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.record import model_record
from tsdkd.stages.models.spec import load_config, load_spec

MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}


@pytest.fixture
def changed(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that copies the model and changes one of its JSON files."""

    def ask(*_: object) -> str:
        raise AssertionError

    monkeypatch.setattr(builtins, "input", ask)

    def change(file: str, **values: object) -> str:
        path = shutil.copytree(student, tmp_path / "model")
        (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | values))
        return str(path)

    return change


@pytest.mark.parametrize("values", [{"auto_map": MAP, "model_type": "own"}, {"auto_map": MAP, "model_type": "clip"}])
def test_a_model_that_needs_custom_code_is_refused(changed: Any, values: dict[str, Any]) -> None:
    """Also one whose configuration transformers knows, but not as a causal language model."""
    name = changed("config.json", **values)
    for load in (load_config, load_spec, load_model, lambda name: model_record("student", name)):
        with pytest.raises(InputError, match=r"needs custom code \(Auto\w+ is \w+\.Own\w*\), which tsdkd does not run"):
            load(name)


def test_a_tokenizer_that_needs_custom_code_is_refused(changed: Any) -> None:
    own = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    name = changed("tokenizer_config.json", auto_map=own, tokenizer_class="OwnTokenizer")
    with pytest.raises(InputError, match=r"needs custom code \(its tokenizer\)"):
        load_spec(name)


def test_a_model_that_transformers_implements_is_loaded_without_its_code(changed: Any) -> None:
    name = changed("config.json", auto_map=MAP)
    assert type(load_model(name).model).__name__ == "LlamaForCausalLM"
