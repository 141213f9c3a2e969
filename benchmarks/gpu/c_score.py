"""c. Scoring at the shapes of Qwen2.5 14B and 1.5B, random weights: tokens per second beside bare forward passes.

    python benchmarks/gpu/c_score.py [--out DIR] [--seconds 240] [--tiny]

Batches of 16 sequences of 512 + 512 tokens, bfloat16. "bare forward" runs both bodies, without logits. Writing to disk
is left out: `score` writes in a thread beside the models.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.common import Figure, Figures, Options, median_seconds, parse_options, peak_above, peak_flops
from benchmarks.gpu.models import random_model, random_rows
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.batches import join_right_padded
from tsdkd.stages.data.scoring import ModelPair, score_responses
from tsdkd.stages.models.model_size import model_size

SIGNALS = ("hidden", "hidden8", "topk", "ranks")


def rate(work: Callable[[], Any], tokens: int, flops_per_token: float, peak: float, options: Options) -> Figure:
    seconds = median_seconds(work, options.device, 1 if options.tiny else 3)
    return {
        "tokens/s": tokens / seconds,
        "share of peak": flops_per_token * tokens / seconds / peak,
        "peak GB above": peak_above(work, options.device),
    }


def main() -> None:
    options = parse_options(__doc__)
    figures = Figures("c_score", options)
    count, length = (2, 8) if options.tiny else (16, 512)
    models: ModelPair = random_model("1.5B", options), random_model("14B", options)
    rows = random_rows(count, length, length, models[0].head.vocab)
    tokens, peak = 2 * count * length, peak_flops(options)
    flops = sum(2.0 * model_size(model.model.config).matmul_parameters for model in models)
    heads = sum(2.0 * model.head.weight.numel() for model in models)
    ids, attention, _ = join_right_padded([r["prompt_ids"] for r in rows], [r["response_ids"] for r in rows])

    @torch.inference_mode()
    def bare() -> None:
        for model in models:
            model.hidden(ids.to(options.device), attention.to(options.device))

    figures.measure("bare forward", partial(rate, bare, tokens, flops - heads, peak, options))
    for signal in SIGNALS:
        config = ScoreConfig(signal=signal)
        work = partial(score_responses, rows, models, config)
        figures.measure(signal, partial(rate, work, tokens, flops - heads / 2, peak, options))
    title = f"score: {count} sequences of {length} + {length} tokens, {peak / 1e12:.0f} TFLOP/s at most"
    figures.finish(title, ["tokens/s", "share of peak", "peak GB above"], ["bare forward", *SIGNALS])


if __name__ == "__main__":
    main()
