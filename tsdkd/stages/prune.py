"""prune: a teacher -> a student with fewer layers, for families without a small model.

Greedy removal as in SLEB (Song et al., 2024, arXiv 2402.09025): each round tries every remaining layer and removes the
one whose absence gives the smallest KL(teacher || pruned model) on a few prompts.
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
from tsdkd.stages.data.prompt_tokens import prompt_token_ids
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.models.load import LanguageModel, load_model
from tsdkd.stages.models.paths import model_directory
from tsdkd.stages.models.record import chat_day, library_versions, model_record
from tsdkd.stages.models.tokenizers import load_tokenizer
from tsdkd.stages.observer import Observer, SilentObserver

FORWARD_TOKENS = 1024
"""Tokens of one forward pass."""


def prune(
    teacher: str,
    prompts: Path,
    output: Path,
    config: PruneConfig,
    observer: Observer | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Write the teacher without `config.drop` of its layers.

    Raises InputError for a model whose layers are not a list in its decoder, and unless 1 to all but one are dropped.
    """
    observer = observer or SilentObserver()
    record = model_record("teacher", teacher)
    source = Prompts(prompts, config.column, config.limit)
    prompt_list = list(source)
    day = chat_day(load_tokenizer(teacher), output, overwrite)
    manifest = Manifest(
        kind="checkpoint",
        config=asdict(config),
        seed=0,
        parents=(source.parent(output),),
        models=(record,),
        libraries=library_versions(),
        day=day,
    )
    model = load_model(teacher, config.dtype)
    saved_dtype = (
        AutoConfig.from_pretrained(model_directory(teacher), trust_remote_code=False).dtype
        if config.dtype == "auto"
        else None
    )
    layers = _LayerStack(model.model.get_decoder())
    if not 0 < config.drop < len(layers):
        raise InputError(
            f"--drop is {config.drop}, but {teacher} has {len(layers)} layers.",
            "Drop at least one layer and keep at least one.",
        )
    with Writer.open(output, manifest, overwrite=overwrite) as writer, observer.writing(output):
        if writer.complete:
            observer.info(f"{output} is complete: nothing to do.")
            return writer.artifact
        sequences = [prompt_token_ids(model.tokenizer, prompt, day)[: config.max_tokens] for prompt in prompt_list]
        summary = _drop_layers(model, layers, sequences, config.drop, observer)
        staging = output / "staging.tmp"
        model.model.to(saved_dtype).save_pretrained(staging)
        model.tokenizer.save_pretrained(staging)
        writer.add_directory(staging)
        staging.rmdir()
        return writer.finish(summary)


class _LayerStack:
    """The layers of a decoder; `use` selects the ones that run."""

    def __init__(self, decoder: Any) -> None:
        if not isinstance(getattr(decoder, "layers", None), torch.nn.ModuleList):
            raise InputError(
                "The layers of this model are not a list in its decoder.", "Use a Llama-, Qwen- or Gemma-style model."
            )
        self.decoder = decoder
        self.layers = list(decoder.layers)
        self.types = getattr(decoder.config, "layer_types", None)

    def __len__(self) -> int:
        return len(self.layers)

    def use(self, indices: Sequence[int]) -> None:
        """Make the decoder and its config consist of these layers."""
        self.decoder.layers = torch.nn.ModuleList(self.layers[i] for i in indices)
        self.decoder.config.num_hidden_layers = len(indices)
        if self.types is not None:
            self.decoder.config.layer_types = [self.types[i] for i in indices]


def _drop_layers(
    model: LanguageModel, layers: _LayerStack, sequences: list[list[int]], drop: int, observer: Observer
) -> dict[str, Any]:
    """Drop `drop` layers of the model in place. Returns their indices, and the KL after each."""
    remaining = list(range(len(layers)))
    reference = [log_probs(model.head.logits(hidden)) for hidden in _hidden_states(model, sequences)]
    dropped: list[int] = []
    kl_after_each: list[float] = []
    trials = sum(len(remaining) - dropped_before for dropped_before in range(drop))
    with observer.progress("trying layers", trials, "trials") as advance, torch.inference_mode():
        for _ in range(drop):
            kl_without: dict[int, float] = {}
            for layer in remaining:
                layers.use([other for other in remaining if other != layer])
                kl_without[layer] = _mean_kl(model, reference, sequences)
                advance(1)
            best = min(kl_without, key=lambda layer: kl_without[layer])
            remaining.remove(best)
            dropped.append(best)
            kl_after_each.append(round(kl_without[best], 4))
    layers.use(remaining)
    return {"dropped_layers": dropped, "kl_after_each": kl_after_each, "layers": len(remaining)}


def _mean_kl(model: LanguageModel, reference: list[Tensor], sequences: list[list[int]]) -> float:
    """KL(teacher || model) per token, nats; `reference` holds the teacher's log-probabilities (tokens, vocab)."""
    divergences = [
        divergence_of(log_p, log_probs(model.head.logits(hidden)), Divergence.jsd(0)).sum()
        for log_p, hidden in zip(reference, _hidden_states(model, sequences), strict=True)
    ]
    return float(sum(divergences)) / sum(map(len, sequences))


def _hidden_states(model: LanguageModel, sequences: list[list[int]]) -> list[Tensor]:
    """Hidden states of all sequences, as a list of (tokens, width)."""
    hidden_states = []
    with torch.inference_mode():
        for batch in batches_by_length([len(ids) for ids in sequences], tokens=FORWARD_TOKENS):
            ids, attention = pad_right([sequences[i] for i in batch])
            hidden = model.hidden(ids.to(model.device), attention.to(model.device))
            hidden_states.append(hidden[attention.bool()])
    return hidden_states
