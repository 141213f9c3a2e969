"""Each term's share of the gradient at the student's final hidden states, as training logs it, and at the weights.

    python benchmarks/gradient_shares.py RUN [--samples 32] [--direct-weight 1] [--em-weight 1] [--k 10]

RUN holds rollouts and scores, of whose responses the first are one batch; the student is the one that was scored.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tsdkd.artifacts.manifest import load_manifest
from tsdkd.core import TSDKDConfig, token_selective_loss_from_hidden
from tsdkd.core.config import TERMS
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.data.source import collate
from tsdkd.stages.models.language_model import hidden_states
from tsdkd.stages.models.load import load_model


def gradient_norms(run: Path, samples: int, config: TSDKDConfig) -> dict[str, tuple[float, float]]:
    """By term: the norm of the weighted term's gradient at the final hidden states, and at all weights."""
    student = load_model(load_manifest(run / "scores").model("student").name, "float32")
    source = OfflineSource(run / "rollouts", run / "scores")
    batch = collate([source[i] for i in range(samples)], source)
    teacher = source.signal(batch)
    weights = [weight.requires_grad_() for weight in student.model.parameters()]
    norms = {}
    for term in ("indirect", "direct", "entropy"):
        others = {TERMS[name]: 0.0 for name in TERMS if name != term}
        hidden = hidden_states(student.model, batch["input_ids"], batch["attention_mask"])
        loss, metrics = token_selective_loss_from_hidden(
            hidden[batch["predicting"]], student.head, teacher, batch["response_mask"], replace(config, **others)
        )
        grads = torch.autograd.grad(loss, weights)
        norms[term] = (
            float(metrics[f"{term}_grad_norm"]),
            float(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).norm()),
        )
    return norms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--direct-weight", type=float, default=1.0)
    parser.add_argument("--em-weight", type=float, default=1.0)
    parser.add_argument("--k", type=int, default=10)
    o = parser.parse_args()
    config = TSDKDConfig(k=o.k, direct_weight=o.direct_weight, em_weight=o.em_weight)
    norms = gradient_norms(o.run, o.samples, config)
    table = Table("term", "share at hidden states", "share at weights")
    totals = [sum(pair[i] for pair in norms.values()) for i in range(2)]
    for term, pair in norms.items():
        table.add_row(term, *(f"{norm / total:.3f}" for norm, total in zip(pair, totals, strict=True)))
    Console().print(table)


if __name__ == "__main__":
    main()
