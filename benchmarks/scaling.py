"""What scoring costs for the paper's pair, by the arithmetic that `tsdkd score` states before it starts.

    python benchmarks/scaling.py [TOKENS_PER_SECOND]

Nothing is loaded. The rate, of prompt and response tokens read by both models, is what score reached.
"""

import sys

import torch
from rich.console import Console
from rich.table import Table

from tsdkd.core import Head
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.score_cost import format_bytes, score_cost

VOCAB, WIDTH = 151_665, 5_120
"""Qwen2.5's real ids, and the hidden size of its 14B."""
PARAMETERS = 14.8e9 + 1.5e9
ULTRA_INTERACT = 288_579
"""Rows of openbmb/UltraInteract_sft."""
PROMPT, RESPONSE = 200, 300
"""Tokens; an assumption."""


def main() -> None:
    rate = float(sys.argv[1]) if len(sys.argv) > 1 else None
    head = Head(torch.empty(VOCAB, WIDTH, dtype=torch.bfloat16, device="meta"))
    table = Table("responses", "signal", "bytes a token", "teacher's head", "total", "forward, PFLOP", "hours")
    for responses in (2_000, 20_000, ULTRA_INTERACT):
        for signal in ("hidden", "hidden8", "topk", "ranks"):
            found = score_cost(ScoreConfig(signal=signal), head, responses * RESPONSE)
            read = responses * (PROMPT + RESPONSE)
            table.add_row(
                f"{responses:,}",
                signal,
                f"{found.bytes_per_token:,}",
                format_bytes(found.head_bytes) if found.head_bytes else "",
                format_bytes(found.bytes),
                f"{2 * PARAMETERS * read / 1e15:,.0f}",
                f"{read / rate / 3600:,.1f}" if rate else "",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
