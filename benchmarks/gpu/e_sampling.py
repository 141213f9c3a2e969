"""e. Online sampling by transformers at the shape of Qwen2.5 1.5B, random weights: tokens per second by batch size.

    python -m benchmarks.gpu.e_sampling [--out DIR] [--seconds 200] [--tiny]

Prompts of 128 tokens; responses of 256 tokens, float32 weights under bfloat16 autocast, as in training, and bfloat16.
"""

from functools import partial

import torch

from benchmarks.gpu.device import measure, open_figures, parse_options, peak_above, seconds_of
from benchmarks.gpu.figures import Figure, Options
from benchmarks.gpu.models import random_model, random_rows
from tsdkd.stages.engines.transformers_engine import sample_responses

BATCHES = (128, 16, 512)


def sampling_rate(batch: int, dtype: torch.dtype, options: Options) -> Figure:
    model = random_model("1.5B", options, dtype)
    prompt, response = (8, 4) if options.tiny else (128, 256)
    prompts = [row["prompt_ids"] for row in random_rows(batch, prompt, 1, model.vocab)]
    sampled: list[list[int]] = []

    def sample(tokens: int) -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=dtype == torch.float32):
            sampled[:] = sample_responses(model, prompts, tokens, temperature=1.0)

    sample(2)
    seconds = seconds_of(partial(sample, response), options.device)
    tokens = sum(map(len, sampled))
    return {
        "tokens/s": tokens / seconds,
        "seconds": seconds,
        "ms a token of all": 1000 * seconds / max(map(len, sampled)),
        "peak GB above": peak_above(partial(sample, response), options.device),
    }


def main() -> None:
    options = parse_options(__doc__)
    columns = ["tokens/s", "seconds", "ms a token of all", "peak GB above"]
    figures = open_figures("e_sampling", "e. Online sampling by transformers", columns, options)
    rows = {
        f"{str(dtype).removeprefix('torch.')} weights, batch {batch}": partial(sampling_rate, batch, dtype, options)
        for batch in ((2,) if options.tiny else BATCHES)
        for dtype in (torch.float32, torch.bfloat16)
    }
    for name, work in rows.items():
        measure(figures, name, work)
    figures.finish(list(rows))


if __name__ == "__main__":
    main()
