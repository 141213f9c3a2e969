"""Compares the Triton kernel, in Triton's interpreter, with the plain path; prints the largest relative differences.

    TRITON_INTERPRET=1 python -m tests.helpers.triton_interpreter

Triton reads TRITON_INTERPRET when it is imported, so this needs a process of its own.
"""

import dataclasses
import json
import sys
from itertools import product

import torch

from tests.helpers.objective_cases import MINILLM, VOCAB, make, random_sampled
from tsdkd.core import TeacherHidden, TSDKDConfig, lm_head, token_selective_loss_from_hidden, triton_kernel, two_passes

DIVERGENCES = [{"beta": beta} for beta in (0.0, 0.9, 1.0)]
DIVERGENCES += [{"divergence": name, "skew": 0.3} for name in ("skew-kl", "skew-reverse-kl")]
HEADS = [{}, {"bias": True, "logit_scale": 0.5, "softcap": 2.0}]


def largest_difference(config: TSDKDConfig, head: dict[str, object], dtype: torch.dtype) -> torch.Tensor:
    results = []
    lm_head.ROW_STEP["cpu"] = 8 if head else 1  # columns of padding rows, as on a GPU
    for compiled in (False, True):
        case = make([9, 4], dtype=dtype, padding_rows=3, **head)
        teacher_head = dataclasses.replace(case.teacher_head, logit_scale=0.5, softcap=head.get("softcap"))
        teacher = TeacherHidden(case.teacher[case.mask], teacher_head)
        loss, metrics = token_selective_loss_from_hidden(
            case.student[case.mask],
            case.head,
            teacher,
            case.mask,
            config,
            chunk=8,
            compiled=compiled,
            sampled=random_sampled(case),
        )
        loss.backward()
        results.append([loss.detach(), *metrics.values(), *(leaf.grad for leaf in case.leaves())])
    pairs = zip(*results, strict=True)
    return torch.stack(
        [(plain - kernel).abs().max() / kernel.abs().max().clamp(min=1e-9) for plain, kernel in pairs]
    ).max()


def main() -> None:
    two_passes.kernel_fits = lambda _: True
    triton_kernel.VOCAB_BLOCK = 8
    assert triton_kernel.VOCAB_BLOCK < VOCAB
    configs = [TSDKDConfig(k=4, temperature=2.0, direct_weight=3.0, **divergence) for divergence in DIVERGENCES]
    configs += [MINILLM, TSDKDConfig(k=4, direct_weight=0.0)]
    worst = {
        str(dtype): float(
            torch.stack([largest_difference(config, head, dtype) for config, head in product(configs, HEADS)]).max()
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    sys.stdout.write(json.dumps(worst))


if __name__ == "__main__":
    main()
