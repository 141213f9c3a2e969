"""No command runs Python code of a model, an adapter, a dataset or the hub, whatever stdin answers."""

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers.commands import run
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tsdkd.cli import app

PACKAGE = Path(__file__).parents[2] / "tsdkd"
OWN = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
LOADERS = {"AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor"}


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def custom_tokenizer(model: Path) -> None:
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")


KINDS: dict[str, Callable[[Path], object]] = {
    "unknown type": lambda model: change(model / "config.json", auto_map=OWN, model_type="own"),
    "type without a language model": lambda model: change(model / "config.json", auto_map=OWN, model_type="clip"),
    "tokenizer": custom_tokenizer,
    "kernel": lambda model: change(model / "config.json", attn_implementation="own/kernel"),
    "kernel of a part": lambda model: change(model / "config.json", text_config={"_attn_implementation": "o/k@1:f"}),
    "kernel of experts": lambda model: change(model / "config.json", experts_implementation="own/kernel"),
    "kernels by part": lambda model: change(model / "config.json", attn_implementation={"text_config": "own/kernel"}),
}
IGNORED: dict[str, Callable[[Path], object]] = {
    "type that transformers has": lambda model: change(model / "config.json", auto_map=OWN),
    "generation": lambda model: change(model / "generation_config.json", custom_generate="own", auto_map=OWN),
    "tokenizer that transformers has": lambda model: change(
        model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}
    ),
}


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """A model with code in every place where libraries look for it, and the file that the code would write."""
    model, mark = save_tiny_model(tmp_path / "model", seed=1), tmp_path / "executed"
    code = f"open({str(mark)!r}, 'w').close()\nclass Own: pass\ndef generate(*a, **k): pass\n"
    (model / "custom_generate").mkdir()
    for file in ("own.py", "model.py", "custom_generate/generate.py"):
        (model / file).write_text(code)
    return model, mark


def commands(model: Path, good: Path, directory: Path) -> dict[str, list[object]]:
    prompts = ["--prompts", write_prompts(directory / "p.jsonl", 2), "--max-new-tokens", 4]
    chain = directory / "chain"
    chain.write_text(f"tsdkd generate --student {model} --prompts {prompts[1]}\n")
    rollouts = directory / "good" / "rollouts"
    run("generate", "--student", good, *prompts, "--rollouts", rollouts)
    at = directory / "new"
    return {
        "generate": ["generate", "--student", model, *prompts, "--run", at],
        "score": ["score", "--rollouts", rollouts, "--teacher", model, "--scores", at],
        "train": ["train", "--student", good, "--teacher", model, *prompts, "--checkpoint", at, "--batch-size", 2],
        "eval": ["eval", "--model", f"m={model}", "--tasks", "embedded", "--results", at],
        "prune": ["prune", "--teacher", model, "--prompts", prompts[1], "--output", at],
        "inspect": ["inspect", "--rollouts", rollouts, "--student", good, "--teacher", model],
        "plan": ["plan", chain],
    }


def test_custom_code_is_refused_by_every_command(hostile: tuple[Path, Path], student: Path, tmp_path: Path) -> None:
    model, mark = hostile
    originals = {name: (model / name).read_bytes() for name in ("config.json", "tokenizer_config.json")}
    for kind, spoil in KINDS.items():
        spoil(model)
        for name, command in commands(model, student, tmp_path).items():
            result = CliRunner().invoke(app, [str(word) for word in command], input="y\n" * 99)
            assert result.exit_code == 2, (kind, name, result.output)
            assert "needs custom code (" in result.stderr, (kind, name)
            assert "which tsdkd does not run" in result.stderr
            assert not mark.exists(), (kind, name)
            assert not (tmp_path / "new").exists(), (kind, name)
        for file, content in originals.items():
            (model / file).write_bytes(content)


@pytest.mark.parametrize("kind", IGNORED)
def test_code_that_a_model_does_not_need_stays_unused(kind: str, hostile: tuple[Path, Path], tmp_path: Path) -> None:
    model, mark = hostile
    IGNORED[kind](model)
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    command = ["generate", "--student", model, "--prompts", prompts, "--max-new-tokens", 4, "--run", tmp_path / "run"]
    result = CliRunner().invoke(app, [str(word) for word in command], input="y\n" * 99)
    assert result.exit_code == 0, result.output
    assert not mark.exists()


def test_code_of_an_adapter_and_of_a_dataset_stays_unused(
    hostile: tuple[Path, Path], student: Path, tmp_path: Path
) -> None:
    model, mark = hostile
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(student), "target_modules": ["q_proj"], "r": 1}
    (tmp_path / "adapter").mkdir()
    shutil.copy(model / "own.py", tmp_path / "adapter")
    change(
        tmp_path / "adapter" / "adapter_config.json",
        **adapter,
        megatron_config={"a": 1},
        megatron_core="own",
        auto_mapping={"base_model_class": "Own", "parent_library": "own"},
    )
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(model / "own.py", data / "data.py")
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    for words in (
        ["--student", tmp_path / "adapter", "--prompts", prompts],
        ["--student", student, "--prompts", data],
    ):
        command = ["generate", *words, "--max-new-tokens", 4, "--run", tmp_path / "run"]
        result = CliRunner().invoke(app, [str(word) for word in command], input="y\n" * 99)
        assert result.exit_code == 2, result.output
        assert not mark.exists()


def test_every_loader_refuses_custom_code_explicitly() -> None:
    """Without the argument, transformers asks on stdin."""
    for module in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            loads = node.func.attr in {"from_pretrained", "from_config"}
            if loads and isinstance(node.func.value, ast.Name) and node.func.value.id in LOADERS:
                given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
                assert given.get("trust_remote_code") is False, f"{module}:{node.lineno}"
