"""The names of the files that stand beside an artifact's parts; none of them is a part."""

MANIFEST_FILE = "manifest.json"
LOCK_FILE = ".lock"
JOURNAL_FILE = ".journal.jsonl"
"""The sessions that made the artifact (journal.py)."""
CONFIG_FILE = "config.yaml"
"""The options that made the artifact, for `--config`."""
