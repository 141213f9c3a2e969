"""The log of training."""

import json
from pathlib import Path

from tsdkd.artifacts import json_files
from tsdkd.stages.metrics.log import METRICS_FILE, read_log


def test_the_log_of_a_long_training_is_read(tmp_path: Path) -> None:
    """A training of 50,000 steps logs more than a JSON file of an artifact may hold."""
    entry = {"x" * json_files.MAX_TEXT: 1.5}
    log = tmp_path / METRICS_FILE
    log.write_text(f"{json.dumps(entry)}\n" * 9)
    assert log.stat().st_size > json_files.MAX_BYTES
    assert read_log(log) == [entry] * 9
