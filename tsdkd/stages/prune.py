"""prune: a teacher -> a student of the same family with fewer layers, for those who have no small sibling at hand.

Greedy removal as in SLEB (Song et al. 2024, arXiv 2402.09025): in every round each remaining layer is left out once,
and the one that matters least goes. What matters is measured as KL(teacher || pruned) on a few prompts.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from tsdkd.artifacts.manifest import Manifest
from tsdkd.artifacts.reader import Artifact
from tsdkd.artifacts.writer import Writer
from tsdkd.core import Divergence
from tsdkd.core.distributions import divergence_of, log_probs
from tsdkd.errors import InputError
from tsdkd.stages.config.prune import PruneConfig
from tsdkd.stages.data.batches import batches_by_length, pad_right
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.models.load import LanguageModel, load_model
from tsdkd.stages.models.paths import model_directory
from tsdkd.stages.models.record import library_versions, model_record
from tsdkd.stages.models.tokenizers import chat_token_ids
from tsdkd.stages.observer import Observer, SilentObserver

FORWARD_TOKENS = 1024
"""Tokens read and projected at a time."""


def prune(
    teacher: str,
    prompts: Path,
    output: Path,
    config: PruneConfig,
    observer: Observer | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Write the teacher without `config.drop` of its layers. Raises InputError when its layers cannot be found."""
    observer = observer or SilentObserver()
    record = model_record("teacher", teacher)
    source = Prompts(prompts, config.column, config.limit)
    chosen = list(source)
    manifest = Manifest(
        kind="checkpoint",
        config=asdict(config),
        seed=0,
        parents=(source.parent(output),),
        models=(record,),
        libraries=library_versions(),
    )
    language_model = load_model(teacher, config.dtype)
    saved = AutoConfig.from_pretrained(model_directory(teacher)).dtype if config.dtype == "auto" else None
    depth = _Depth(language_model.model.get_decoder())
    if not 0 < config.drop < len(depth.layers):
        raise InputError(
            f"--drop is {config.drop}, but {teacher} has {len(depth.layers)} layers.",
            "Drop at least one and keep at least one.",
        )
    with Writer.open(output, manifest, overwrite=overwrite) as writer, observer.writing(output):
        if writer.complete:
            observer.info(f"{output} is complete: nothing to do.")
            return writer.artifact
        texts = [chat_token_ids(language_model.tokenizer, prompt.messages)[: config.max_tokens] for prompt in chosen]
        summary = _choose(language_model, depth, texts, config.drop, observer)
        staging = output / "staging.tmp"
        language_model.model.to(saved).save_pretrained(staging)
        language_model.tokenizer.save_pretrained(staging)
        writer.adopt(staging)
        staging.rmdir()
        return writer.finish(summary)


class _Depth:
    """The decoder's stack of layers, of which some can be left out."""

    def __init__(self, body: Any) -> None:
        if not isinstance(getattr(body, "layers", None), torch.nn.ModuleList):
            raise InputError(
                "This model keeps its layers where tsdkd does not know.", "Use a Llama-, Qwen- or Gemma-style model."
            )
        self.body = body
        self.layers = list(body.layers)
        self.types = getattr(body.config, "layer_types", None)

    def keep(self, indices: Sequence[int]) -> None:
        self.body.layers = torch.nn.ModuleList(self.layers[i] for i in indices)
        self.body.config.num_hidden_layers = len(indices)
        if self.types is not None:
            self.body.config.layer_types = [self.types[i] for i in indices]


def _choose(
    language_model: LanguageModel, depth: _Depth, texts: list[list[int]], drop: int, observer: Observer
) -> dict[str, Any]:
    """Leave out `drop` layers of the model in place; tell which, and the divergence after each."""
    kept = list(range(len(depth.layers)))
    head = language_model.head
    reference = [log_probs(head.logits(hidden)) for hidden in _read(language_model, texts)]
    dropped: list[int] = []
    costs: list[float] = []
    trials = sum(len(kept) - round_ for round_ in range(drop))
    with observer.progress("layers tried", trials, "trials") as advance, torch.inference_mode():
        for _ in range(drop):
            cost: dict[int, float] = {}
            for layer in kept:
                depth.keep([other for other in kept if other != layer])
                divergences = [
                    divergence_of(log_p, log_probs(head.logits(hidden)), Divergence.jsd(0)).sum()
                    for log_p, hidden in zip(reference, _read(language_model, texts), strict=True)
                ]
                cost[layer] = float(sum(divergences)) / sum(map(len, texts))
                advance(1)
            least = min(cost, key=lambda layer: cost[layer])
            kept.remove(least)
            dropped.append(least)
            costs.append(round(cost[least], 4))
    depth.keep(kept)
    return {"dropped_layers": dropped, "kl_after_each": costs, "layers": len(kept)}


def _read(language_model: LanguageModel, texts: list[list[int]]) -> list[Tensor]:
    """Hidden states (tokens, width) of all texts, in pieces."""
    pieces = []
    with torch.inference_mode():
        for batch in batches_by_length([len(text) for text in texts], tokens=FORWARD_TOKENS):
            ids, attention = pad_right([texts[i] for i in batch])
            device = language_model.device
            hidden = language_model.hidden(ids.to(device), attention.to(device))
            pieces.append(hidden[attention.bool()])
    return pieces
