"""Prompts for tests, and the directory of real data beside the checkout."""

import json
from pathlib import Path

REAL_DATA = Path(__file__).parents[3] / "shared"


def write_prompts(path: Path, count: int) -> Path:
    rows = [{"prompt": f"What is {i} plus {i * 7 % 5}{'?' * (i % 4 + 1)}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
