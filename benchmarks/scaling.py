"""The cost of scoring with the paper's pair, computed as `tsdkd score` computes it before it starts.

    python benchmarks/scaling.py [TOKENS_PER_SECOND]

Loads no model. The rate counts tokens of prompts and responses that both models read. Without it, the table has no
hours.
"""

import sys

import torch
from rich.console import Console
from rich.table import Table

from tsdkd.core import Head
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.score_cost import format_bytes, score_cost

VOCAB, WIDTH = 151_665, 5_120
"""Qwen2.5: ids of its tokenizer, hidden size of its 14B."""
PARAMETERS = 14.8e9 + 1.5e9
"""Teacher and student."""
ULTRA_INTERACT = 288_579
"""Rows of openbmb/UltraInteract_sft."""
PROMPT_TOKENS, RESPONSE_TOKENS = 200, 300
"""Assumed."""


def main() -> None:
    rate = float(sys.argv[1]) if len(sys.argv) > 1 else None
    head = Head(torch.empty(VOCAB, WIDTH, dtype=torch.bfloat16, device="meta"))
    table = Table("responses", "signal", "bytes per token", "teacher's head", "total", "forward, PFLOP", "hours")
    for responses in (2_000, 20_000, ULTRA_INTERACT):
        for signal in ("hidden", "hidden8", "topk", "ranks"):
            cost = score_cost(ScoreConfig(signal=signal), head, responses * RESPONSE_TOKENS)
            tokens = responses * (PROMPT_TOKENS + RESPONSE_TOKENS)
            table.add_row(
                f"{responses:,}",
                signal,
                f"{cost.bytes_per_token:,}",
                format_bytes(cost.head_bytes) if cost.head_bytes else "",
                format_bytes(cost.bytes),
                f"{2 * PARAMETERS * tokens / 1e15:,.0f}",
                f"{tokens / rate / 3600:,.1f}" if rate else "",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
