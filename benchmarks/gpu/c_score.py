"""c. Scoring at the shapes of Qwen2.5 14B and 1.5B, random weights: tokens per second beside bare forward passes.

    python -m benchmarks.gpu.c_score [--out DIR] [--seconds 200] [--tiny]

Batches of 16 sequences of 512 + 512 tokens, bfloat16. "bare forward" runs both bodies, without logits. Writing to disk
is left out: `score` writes in a thread beside the models.
"""

from functools import cached_property, partial

import torch

from benchmarks.gpu.device import measure, median_seconds, open_figures, parse_options, peak_above, peak_flops
from benchmarks.gpu.figures import Figure, Options
from benchmarks.gpu.models import random_model, random_rows
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.batches import pad_right
from tsdkd.stages.data.scoring import ModelPair, score_responses
from tsdkd.stages.models.model_size import model_size

BARE = "bare forward"
SIGNALS = ("hidden", "hidden8", "topk", "ranks")


class Batch:
    """A batch of rollouts and both models, which are made when the first figure needs them."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.count, self.length = (2, 8) if options.tiny else (16, 512)

    @cached_property
    def models(self) -> ModelPair:
        return random_model("1.5B", self.options), random_model("14B", self.options)

    @cached_property
    def peak(self) -> float:
        return peak_flops(self.options)

    @cached_property
    def rows(self) -> list[dict[str, object]]:
        return random_rows(self.count, self.length, self.length, self.models[0].vocab)

    def measure(self, signal: str) -> Figure:
        """Of a signal, or of the bare forward passes; every second token is a response token."""
        work = self.bare if signal == BARE else partial(score_responses, self.rows, self.models, ScoreConfig(signal))
        device, tokens = self.options.device, 2 * self.count * self.length
        seconds = median_seconds(work, device, 1 if self.options.tiny else 3)
        heads = sum(2.0 * model.head.weight.numel() for model in self.models)
        flops = sum(2.0 * model_size(model.model.config).matmul_parameters for model in self.models) - heads
        flops += 0 if signal == BARE else heads / 2
        return {
            "tokens/s": tokens / seconds,
            "seconds": seconds,
            "share of peak": flops * tokens / seconds / self.peak,
            "peak GB above": peak_above(work, device),
            "TFLOP/s at most": self.peak / 1e12,
        }

    @torch.inference_mode()
    def bare(self) -> None:
        ids, attention = pad_right([row["prompt_ids"] + row["response_ids"] for row in self.rows])
        for model in self.models:
            model.hidden(ids.to(self.options.device), attention.to(self.options.device))


def main() -> None:
    options = parse_options(__doc__)
    batch = Batch(options)
    title = f"c. Score: {batch.count} sequences of {batch.length} + {batch.length} tokens"
    columns = ["tokens/s", "seconds", "share of peak", "peak GB above", "TFLOP/s at most"]
    figures = open_figures("c_score", title, columns, options)
    for name in (BARE, *SIGNALS):
        measure(figures, name, partial(batch.measure, name))
    figures.finish([BARE, *SIGNALS])


if __name__ == "__main__":
    main()
