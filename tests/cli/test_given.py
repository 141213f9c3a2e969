"""Conversations with tools from a file to the report, by the commands of a user."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from tests.helpers.chat_templates import CONVERSATIONS
from tests.helpers.commands import refuse, run
from tests.helpers.models import save_tiny_model
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.reader import read_artifact

CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Ulm"}}}]


def write_conversations(path: Path, count: int) -> Path:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Rain on day {i}?"},
                {"role": "assistant", "content": None, "tool_calls": CALL},
                {"role": "tool", "content": "no"},
                {"role": "assistant", "content": f"No rain on day {i}."},
                {"role": "user", "content": "Thanks"},
                {"role": "assistant", "content": "You are welcome."},
            ],
            "tools": tools,
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_conversations_with_tools_from_the_file_to_the_report(tmp_path: Path) -> None:
    student, teacher = (
        save_tiny_model(tmp_path / name, seed=seed, layers=layers) for name, seed, layers in (("s", 2, 2), ("t", 1, 3))
    )
    for model in (student, teacher):
        (model / "chat_template.jinja").write_text(CONVERSATIONS["chatml"])
    rows, chain = write_conversations(tmp_path / "rows.jsonl", 8), ("--run", tmp_path / "run")
    shown = run("generate", "--policy", "given", "--student", student, "--prompts", rows, *chain)
    assert "8 (skipped: none)" in shown
    assert "16 (skipped: none)" in shown
    run("score", "--student", student, "--teacher", teacher, "--k", 4, *chain)
    run("train", "--k", 4, "--epochs", 1, "--batch-size", 4, "--held-out", 0.3, "--eval-steps", 1, *chain)
    inspected = run("inspect", *chain)
    assert "in 2 turns, with " in inspected
    assert "⟦" in inspected
    assert "8 in 16 turns" in run("inspect", "--aggregate", *chain)
    run("report", tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The responses to 8 prompts of rows.jsonl were given: 8 responses with 16 turns" in page


def test_conversations_in_a_chat_template_of_ones_own(student: Path, teacher: Path, tmp_path: Path) -> None:
    """The rollouts hold a copy of its file, which later stages and the checkpoint take; they refuse another one."""
    rows, template = write_conversations(tmp_path / "rows.jsonl", 4), tmp_path / "own.jinja"
    template.write_text(CONVERSATIONS["marked"].replace("{{ '<|start|>tools", "{{ '<|start|>functions"))
    chain, pair = ("--run", tmp_path), ("--student", student, "--teacher", teacher, "--k", 4)
    run("generate", "--policy", "given", *pair[:2], "--prompts", rows, *chain, "--chat-template", template)
    template.unlink()
    run("score", *pair, *chain)
    run("train", "--k", 4, "--epochs", 1, "--batch-size", 4, *chain)
    manifests = [load_manifest(tmp_path / kind) for kind in ("rollouts", "scores", "checkpoint")]
    assert len({manifest.model("student").chat_template for manifest in manifests}) == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    (row, *_) = read_artifact(tmp_path / "rollouts", "rollouts").table().to_pylist()
    messages, tools = (json.loads(rows.read_text().splitlines()[0])[name] for name in ("messages", "tools"))
    whole = tokenizer.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    assert "functions" in tokenizer.decode(row["prompt_ids"])
    assert row["prompt_ids"] + row["response_ids"] == whole["input_ids"][:-1]  # a line break follows the end token
    assert row["response_mask"] == [bool(learned) for learned in whole["assistant_masks"][len(row["prompt_ids"]) : -1]]
    for command in (
        ("score", *pair, *chain, "--scores", tmp_path / "other"),
        ("train", "--k", 4, *chain, "--checkpoint", tmp_path / "other"),
        ("inspect", *chain),
        ("inspect", "--rollouts", tmp_path / "rollouts", *pair),
    ):
        cause, _ = refuse(*command, "--chat-template", "plain")
        assert "made with --chat-template chat_template.jinja" in cause
        assert "this command runs with --chat-template plain" in cause


def test_a_teacher_has_no_part_in_given_responses(tmp_path: Path) -> None:
    rows = write_conversations(tmp_path / "rows.jsonl", 1)
    cause, remedy = refuse(
        "generate", "--policy", "given", "--teacher", "t", "--prompts", rows, "--run", tmp_path / "run"
    )
    assert "does not use the teacher t" in cause
    assert "give it to tsdkd score" in remedy
