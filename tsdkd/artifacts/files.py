"""The names of an artifact's files: those of `NO_PARTS` stand beside its parts."""

from re import fullmatch, sub

MANIFEST_FILE = "manifest.json"
LOCK_FILE = ".lock"
REPLACEMENT_FILE = ".replacement"
"""Marks the pending directory of a new artifact (replacing.py)."""
JOURNAL_FILE = ".journal.jsonl"
"""The sessions that made the artifact (journal.py)."""
TIMES_FILE = ".times.jsonl"
"""The seconds of each part of every optimizer step of training."""
CONFIG_FILE = "config.yaml"
"""The options that made the artifact, for `--config`."""
HEAD_FILE = "teacher_head.safetensors"
"""The part of scores that holds the teacher's head; of several teachers, each has its own (`teacher_file`)."""
CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""The part of rollouts that holds the chat template of `--chat-template FILE`; a model's file of that name."""
NO_PARTS = {MANIFEST_FILE, LOCK_FILE, JOURNAL_FILE, TIMES_FILE, CONFIG_FILE, REPLACEMENT_FILE}


def teacher_file(file: str, index: int | None) -> str:
    """The name of a part of scores that belongs to one of several teachers, such as `part-00000-1.parquet`.

    `index`: of the teacher in the order of names, from 0; None for an only teacher, whose part is `file` itself.
    """
    stem, _, extension = file.partition(".")
    return file if index is None else f"{stem}-{index}.{extension}"


def teacher_index(table: str) -> int | None:
    """The `index` of the teacher whose scores a table holds."""
    named = fullmatch(r"part-\d+-(\d+)\.parquet", table)
    return int(named[1]) if named else None


def rollouts_table(table: str) -> str:
    """The table of the rollouts whose responses a table of scores has."""
    return sub(r"^(part-\d+)-\d+\.", r"\1.", table)
