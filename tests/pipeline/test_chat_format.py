"""One chat format from prompts to results: recorded, taken by later stages, or refused with the difference."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from tests.helpers.chat_templates import NO_SYSTEM, THINKING
from tests.helpers.commands import refuse, run
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tsdkd.artifacts.files import CHAT_TEMPLATE_FILE, CONFIG_FILE
from tsdkd.artifacts.manifest import Manifest, load_manifest
from tsdkd.artifacts.reader import read_artifact, verify_artifact
from tsdkd.cli import app
from tsdkd.stages.models.chat_format import template_defaults

OFF, ON = '{"enable_thinking": false}', '{"enable_thinking": true}'
CLOSED = "<think>\n\n</think>\n\n"
"""What a template writes for a response without a thought."""
SHAPE = ("--epochs", 1, "--batch-size", 2, "--micro-batch-size", 2, "--precision", "float32")
SAMPLING = ("--engine", "transformers", "--max-new-tokens", 4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("thinking")
    paths = {}
    for seed, role in enumerate(("student", "teacher")):
        paths[role] = save_tiny_model(directory / role, seed=seed, width=32 + 16 * seed)
        (paths[role] / CHAT_TEMPLATE_FILE).write_text(THINKING)
    paths["base"] = save_tiny_model(directory / "base", seed=3)
    (paths["base"] / CHAT_TEMPLATE_FILE).unlink()
    return paths


@pytest.fixture(scope="module")
def off(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without thoughts, whose template's file is gone after its first stage."""
    directory = tmp_path_factory.mktemp("off")
    prompts, template = write_prompts(directory / "prompts.jsonl", 4), directory / "own.jinja"
    template.write_text(THINKING + "{{ '' }}")
    student = ("--student", models["student"], "--run", directory)
    run(
        *("generate", *student, "--prompts", prompts, *SAMPLING),
        *("--chat-template", template, "--chat-template-kwargs", OFF),
    )
    again = directory / "again"
    run("generate", "--config", directory / "rollouts" / CONFIG_FILE, "--rollouts", again)
    assert load_manifest(again).fingerprint == load_manifest(directory / "rollouts").fingerprint
    shutil.copy(template, directory / "copy.jinja")
    template.unlink()
    run("score", *student, "--teacher", models["teacher"], "--k", 4)
    run("train", "--run", directory, "--k", 4, *SHAPE)
    return directory


def prompt_texts(rollouts: Path, tokenizer: Any) -> list[str]:
    ids = read_artifact(rollouts, "rollouts").table(["prompt_ids"])["prompt_ids"].to_pylist()
    return [tokenizer.decode(prompt) for prompt in ids]


def student_template(manifest: Manifest) -> str:
    return manifest.model("student").chat_template


def test_a_run_has_one_format(off: Path, models: dict[str, Path]) -> None:
    """Its prompts, its records of the student, and its checkpoint, unless the caller gives another keyword."""
    tokenizer = AutoTokenizer.from_pretrained(off / "checkpoint")
    texts = prompt_texts(off / "rollouts", tokenizer)
    assert all(text.endswith(CLOSED) for text in texts)
    manifests = [load_manifest(off / kind) for kind in ("rollouts", "scores", "checkpoint")]
    assert len({student_template(manifest) for manifest in manifests}) == 1
    assert manifests[0].config["chat"] == {"template": None, "kwargs": OFF}
    assert [parent.kind for parent in manifests[0].parents] == ["prompts", "chat-template"]
    assert template_defaults(tokenizer.chat_template) == {"enable_thinking": False}
    for keywords, closed in (({}, True), ({"enable_thinking": True}, False)):
        message = [{"role": "user", "content": "Hello"}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, **keywords)
        assert text.endswith(CLOSED) == closed
    verify_artifact(off / "checkpoint")


def test_later_stages_take_the_format_of_the_rollouts_or_refuse_another(
    off: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    pair = ("--student", models["student"], "--teacher", models["teacher"])
    same = ("--chat-template", off / "copy.jinja", "--chat-template-kwargs", OFF)
    commands = {
        "score": ("--run", off, *pair, "--scores", tmp_path / "scores", "--k", 4),
        "train": ("--run", off, "--checkpoint", tmp_path / "checkpoint", "--k", 4, *SHAPE),
        "inspect": ("--run", off),
    }
    online = ("train", "--rollouts", off / "rollouts", *pair, "--lambda", 0, *SHAPE, *SAMPLING, "--k", 4)
    for command, words in [*commands.items(), ("train", (*online[1:], "--checkpoint", tmp_path / "online"))]:
        cause, remedy = refuse(command, *words, "--chat-template-kwargs", ON)
        assert OFF in cause
        assert ON in cause
        assert "own.jinja" in cause or CHAT_TEMPLATE_FILE in cause
        assert "Leave out" in remedy
        run(command, *words, *same)
    found = [load_manifest(tmp_path / name) for name in ("scores", "checkpoint", "online")]
    assert {student_template(manifest) for manifest in found} == {student_template(load_manifest(off / "scores"))}
    for name in ("scores", "checkpoint"):
        assert load_manifest(tmp_path / name).identity == load_manifest(off / name).identity
    cause, _ = refuse("inspect", "--run", off, "--aggregate", "--chat-template", "plain")
    assert "--chat-template plain" in cause


def test_artifacts_without_the_options_record_nothing_of_them(
    models: dict[str, Path], prompts: Path, tmp_path: Path
) -> None:
    words = ("--student", models["student"], "--run", tmp_path)
    run("generate", *words, "--prompts", prompts, *SAMPLING)
    manifest = load_manifest(tmp_path / "rollouts")
    assert "chat" not in manifest.config
    assert CHAT_TEMPLATE_FILE not in {part.file for part in manifest.parts}
    cause, _ = refuse("score", *words, "--teacher", models["teacher"], "--chat-template", "plain")
    assert "with the model's own chat template, and this command runs with --chat-template plain" in cause


def test_a_students_own_template_that_changed_after_the_prompts_is_refused(
    models: dict[str, Path], prompts: Path, tmp_path: Path
) -> None:
    """A student with other weights may have another template."""
    student = shutil.copytree(models["student"], tmp_path / "student")
    words = ("--student", student, "--run", tmp_path)
    pair = (*words, "--teacher", models["teacher"])
    run("generate", *words, "--prompts", prompts, *SAMPLING)
    run("score", *pair, "--k", 4)
    own = student_template(load_manifest(tmp_path / "rollouts"))
    (student / CHAT_TEMPLATE_FILE).write_text(THINKING + "{{ '' }}")
    online = ("train", *pair, "--rollouts", tmp_path / "rollouts", "--lambda", 0, *SHAPE, *SAMPLING, "--k", 4)
    for command in (
        ("score", *pair, "--k", 4, "--scores", tmp_path / "again"),
        ("train", *words, "--k", 4, *SHAPE),
        (*online, "--checkpoint", tmp_path / "online"),
    ):
        cause, remedy = refuse(*command)
        assert "student's chat template was changed" in cause
        assert f"it was {own[:12]} ({student}), and is " in cause
        assert "Restore the model's chat template" in remedy
    other = ("--student", models["base"], "--teacher", models["teacher"], "--scores", tmp_path / "other")
    run("score", "--run", tmp_path, *other, "--k", 4)


def test_a_changed_copy_or_record_of_the_format_is_refused(off: Path, models: dict[str, Path], tmp_path: Path) -> None:
    rollouts = shutil.copytree(off / "rollouts", tmp_path / "rollouts")
    words = ("train", "--rollouts", rollouts, "--scores", off / "scores", "--checkpoint", tmp_path / "c", *SHAPE)
    (rollouts / CHAT_TEMPLATE_FILE).write_text("{{ messages }}")
    assert "has a hash that differs from the manifest" in refuse(*words)[0]
    (rollouts / CHAT_TEMPLATE_FILE).unlink()
    (rollouts / CHAT_TEMPLATE_FILE).symlink_to(off / "copy.jinja")
    assert "links to a file outside its artifact" in refuse(*words)[0]
    content = json.loads((rollouts / "manifest.json").read_text())
    content["config"]["chat"]["template"] = str(off / "copy.jinja")
    (rollouts / "manifest.json").write_text(json.dumps(content))
    assert "config.chat.template is" in refuse(*words)[0]


def test_another_format_is_another_artifact(off: Path, models: dict[str, Path], tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 2)
    words = ("generate", "--student", models["student"], "--prompts", prompts, *SAMPLING, "--run", tmp_path)
    run(*words, "--chat-template-kwargs", OFF)
    run(*words, "--chat-template-kwargs", '{"enable_thinking":false}')  # complete: nothing to do
    for more, named in (
        (("--chat-template-kwargs", ON), "--chat-template-kwargs was"),
        ((), "--chat-template-kwargs was"),
        (("--chat-template-kwargs", OFF, "--chat-template", off / "copy.jinja"), "parent chat-template was"),
    ):
        cause, _ = refuse(*words, *more)
        assert named in cause
    content = {"prompts": str(prompts), "chat-template-kwargs": {"enable_thinking": False}}
    (tmp_path / "c.yaml").write_text(json.dumps(content))
    run("generate", "--config", tmp_path / "c.yaml", "--student", models["student"], *SAMPLING, "--run", tmp_path)


def test_online_training_records_its_format(models: dict[str, Path], tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 2)
    pair = ("--student", models["base"], "--teacher", models["teacher"])
    words = ("train", *pair, "--prompts", prompts, *SHAPE, *SAMPLING, "--run", tmp_path, "--k", 4)
    cause, remedy = refuse(*words)
    assert "no chat template" in cause
    assert "--chat-template plain" in remedy
    run(*words, "--chat-template", "plain")
    manifest = load_manifest(tmp_path / "checkpoint")
    assert manifest.config["chat"] == {"template": "plain", "kwargs": None}
    assert "chat" not in manifest.config["online"]["sampling"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert text == "User:\nHello\n\n"


def test_an_engine_gets_the_ids_of_one_bos_token(models: dict[str, Path], tmp_path: Path) -> None:
    """A template that writes it, with a system message that it refuses."""
    file, prompts = tmp_path / "t.jinja", tmp_path / "prompts.jsonl"
    file.write_text(NO_SYSTEM)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}]
    prompts.write_text(json.dumps({"messages": messages}) + "\n")
    options = ("--prompts", prompts, "--chat-template", file, *SAMPLING, "--run", tmp_path)
    run("generate", "--policy", "teacher", "--teacher", models["teacher"], *options)
    tokenizer = AutoTokenizer.from_pretrained(models["teacher"])
    (text,) = prompt_texts(tmp_path / "rollouts", tokenizer)
    assert text == "<|start|><turn>user\nBe brief.\n\nHow?<|end|>\n<turn>model\n"


def test_the_next_command_after_training_measures_in_its_format(off: Path) -> None:
    shown = run("train", "--run", off, "--k", 4, *SHAPE)
    (command,) = [line.removeprefix("next: ") for line in shown.splitlines() if line.startswith("next: ")]
    chat = ("--chat-template", str(off / "rollouts" / CHAT_TEMPLATE_FILE), "--chat-template-kwargs", OFF)
    assert shlex.split(command) == ["tsdkd", "eval", "--run", str(off), *chat]


def test_eval_measures_every_model_in_one_format(
    off: Path, models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    """A run's own checkpoint is refused in another format than its training's; a comparison names another template."""
    words = ("eval", "--tasks", "gsm8k", "--data", rows, "--limit", 1, "--max-new-tokens", 4, "--max-length", 400)
    student, trained = ("--model", f"student={models['student']}"), ("--model", f"distilled={off / 'checkpoint'}")
    cause, remedy = refuse(*words, *trained, "--run", off, "--chat-template-kwargs", ON)
    assert f"with {OFF}" in cause
    assert f"with {ON}" in cause
    assert "--results" in remedy
    result = CliRunner().invoke(app, [str(word) for word in (*words, *student, *trained, "--run", off)])
    assert "another chat template" in result.stdout
    assert f"{models['student']} is prompted with its chat template." in " ".join(result.stderr.split())
    assert f"checkpoint is prompted with its chat template with {OFF}." in " ".join(result.stderr.split())
    shutil.rmtree(off / "results")
    same = ("--chat-template", off / "copy.jinja", "--chat-template-kwargs", OFF)
    output = run(*words, *student, *trained, "--run", off, *same)
    assert "another chat template" not in output
    results = read_artifact(off / "results" / "student", "results")
    assert results.manifest.config["chat"] == {"template": None, "kwargs": OFF}
    assert results.table(["prompt"])["prompt"][0].as_py().endswith(CLOSED)
    config = off / "results" / "student" / CONFIG_FILE
    run("eval", "--config", config, "--results", tmp_path / "again")
    assert load_manifest(tmp_path / "again" / "student").fingerprint == results.fingerprint
    cause, _ = refuse(*words, *student, "--run", off)
    assert "--chat-template-kwargs was" in cause
    run(*words, *trained, "--results", tmp_path / "on", "--chat-template-kwargs", ON)
    run(*words, "--model", f"base={models['base']}", "--results", tmp_path / "plain", "--chat-template", "plain")
    cause, _ = refuse(*words, *student, "--results", tmp_path / "x", "--no-chat", "--chat-template", "plain")
    assert "--no-chat switches the chat template off" in cause
