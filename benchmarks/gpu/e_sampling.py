"""e. Online sampling by transformers at the shape of Qwen2.5 1.5B, random weights: tokens per second by batch size.

    python benchmarks/gpu/e_sampling.py [--out DIR] [--seconds 240] [--tiny]

Prompts of 128 tokens; responses of 256 tokens, float32 weights under bfloat16 autocast, as in training, and bfloat16.
"""

from functools import partial

import torch

from benchmarks.gpu.common import Figure, Figures, Options, parse_options, peak_above, seconds_of
from benchmarks.gpu.models import random_model, random_rows
from tsdkd.stages.engines.transformers_engine import sample_responses

BATCHES = (16, 64, 128)


def sampling_rate(batch: int, dtype: torch.dtype, options: Options) -> Figure:
    model = random_model("1.5B", options, dtype)
    prompt, response = (8, 4) if options.tiny else (128, 256)
    prompts = [row["prompt_ids"] for row in random_rows(batch, prompt, 1, model.head.vocab)]
    sampled: list[list[int]] = []

    def sample(tokens: int = response) -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=dtype == torch.float32):
            sampled[:] = sample_responses(model, prompts, tokens, temperature=1.0)

    sample(2)
    seconds = seconds_of(sample, options.device)
    tokens = sum(map(len, sampled))
    return {
        "tokens/s": tokens / seconds,
        "seconds": seconds,
        "peak GB above": peak_above(partial(sample, 8), options.device),
    }


def main() -> None:
    options = parse_options(__doc__)
    figures = Figures("e_sampling", options)
    rows = {
        f"{str(dtype).removeprefix('torch.')} weights, batch {batch}": partial(sampling_rate, batch, dtype, options)
        for batch in ((2,) if options.tiny else BATCHES)
        for dtype in (torch.float32, torch.bfloat16)
    }
    for name, work in rows.items():
        figures.measure(name, work)
    figures.finish("online sampling by transformers", ["tokens/s", "seconds", "peak GB above"], list(rows))


if __name__ == "__main__":
    main()
