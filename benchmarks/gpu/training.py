"""What the scripts that train share: recorded samples of random ids, and the seconds of steps."""

from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.gpu.device import synchronize
from benchmarks.gpu.figures import Options
from benchmarks.gpu.models import random_rows
from tsdkd.core import Head, TeacherHidden, TeacherSignal
from tsdkd.stages.data.batches import Batch, predicted_ids
from tsdkd.stages.data.source import Sample, ScoringSnapshot


class RandomSource:
    """Recorded samples of random ids; all micro-batches share the recorded values."""

    teacher_fraction = 0.0

    def __init__(self, options: Options, vocab: int, responses: int, *, mixed: bool) -> None:
        longest, width = (8, 48) if options.tiny else (512, 5120)
        generator = torch.Generator().manual_seed(0)
        rows = random_rows(responses, longest, longest, vocab)
        if mixed:
            cuts = torch.randint(longest // 8, longest + 1, (responses, 2), generator=generator).tolist()
            rows = [
                row | {"prompt_ids": row["prompt_ids"][:prompt], "response_ids": row["response_ids"][:response]}
                for row, (prompt, response) in zip(rows, cuts, strict=True)
            ]
        self.samples, k, most = rows, 10, 16 * longest

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(torch.bfloat16)

        self.columns = {
            "hidden": normal(most, width),
            "student_log_prob": torch.full((most,), -10.0),
            "candidates": torch.randint(0, vocab, (most, k), generator=generator),
        }
        on_device = torch.Generator(options.device).manual_seed(0)
        head = torch.randn(vocab, width, device=options.device, generator=on_device)
        self.head = Head(head.mul_(width**-0.5).to(torch.bfloat16)).aligned

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def length(self, index: int) -> int:
        return len(self.samples[index]["prompt_ids"]) + len(self.samples[index]["response_ids"])

    def prompt_id(self, index: int) -> str:
        return str(index)

    def with_responses(self, samples: list[Sample], *_: Any) -> list[Sample]:
        return samples

    def read_ahead(self, samples: list[Sample]) -> list[Sample]:
        return samples

    def recorded(self, samples: list[Sample]) -> dict[str, Tensor]:
        tokens = sum(len(sample["response_ids"]) for sample in samples)
        return {name: values[:tokens] for name, values in self.columns.items()}

    def signal(self, batch: Batch) -> TeacherSignal:
        return TeacherHidden(batch["recorded"]["hidden"], self.head)

    def scoring_snapshot(self, batch: Batch) -> ScoringSnapshot:
        return ScoringSnapshot(
            predicted_ids(batch), batch["recorded"]["student_log_prob"], batch["recorded"]["candidates"]
        )


class StepClock(TrainerCallback):
    """Seconds of each whole step."""

    def __init__(self, device: str) -> None:
        self.device, self.marks = device, list[float]()

    @property
    def steps(self) -> list[float]:
        return [end - start for start, end in pairwise(self.marks)]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.mark()

    def mark(self) -> None:
        synchronize(self.device)
        self.marks.append(perf_counter())
