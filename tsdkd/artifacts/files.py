"""The names of an artifact's files: those of `NO_PARTS` stand beside its parts."""

MANIFEST_FILE = "manifest.json"
LOCK_FILE = ".lock"
REPLACEMENT_FILE = ".replacement"
"""Marks the pending directory of a new artifact (replacing.py)."""
JOURNAL_FILE = ".journal.jsonl"
"""The sessions that made the artifact (journal.py)."""
CONFIG_FILE = "config.yaml"
"""The options that made the artifact, for `--config`."""
HEAD_FILE = "teacher_head.safetensors"
"""The part of scores that holds the teacher's head."""
NO_PARTS = {MANIFEST_FILE, LOCK_FILE, JOURNAL_FILE, CONFIG_FILE, REPLACEMENT_FILE}
