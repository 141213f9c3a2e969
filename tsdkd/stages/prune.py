"""prune: a teacher -> a student with fewer layers, for families without a small model.

Greedy removal as in SLEB (Song et al., 2024, arXiv 2402.09025): each round tries every remaining layer and removes the
one whose absence gives the smallest KL(teacher || pruned model) on a few prompts.
"""

from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsdkd.artifacts.locks import reading_inputs
from tsdkd.artifacts.manifest import Manifest
from tsdkd.artifacts.reader import Artifact
from tsdkd.artifacts.writer import Writer
from tsdkd.core import Divergence
from tsdkd.core.distributions import divergence_of, log_probs
from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.config.prune import PruneConfig
from tsdkd.stages.data.batches import batches_by_length, pad_right
from tsdkd.stages.data.prompt_tokens import prompt_token_ids
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.models.adapters import is_adapter
from tsdkd.stages.models.attention import require_attention
from tsdkd.stages.models.language_model import LanguageModel, not_finite_error
from tsdkd.stages.models.layers import DecoderLayers, drop_error
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.paths import model_directory
from tsdkd.stages.models.record import chat_day, library_versions, model_record
from tsdkd.stages.models.save import save_model
from tsdkd.stages.models.spec import load_config, load_spec
from tsdkd.stages.models.vocabulary import require_known_ids
from tsdkd.stages.observer import Observer, SilentObserver

FORWARD_TOKENS = 1024
"""Tokens of one forward pass."""
ROUNDING = 1e-5
"""The largest KL between two computations of one float32 model, nats per token."""


@reading_inputs()
def prune(
    teacher: str,
    prompts: Path,
    output: Path,
    config: PruneConfig,
    observer: Observer | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Write the teacher without `config.drop` of its layers.

    The written model is loaded again and compared with the measured one.

    Raises InputError for an adapter, for a model whose config cannot describe it with fewer layers, and unless 1 to all
    but one are dropped; TsdkdError if the written model computes something else.
    """
    observer = observer or SilentObserver()
    record = model_record("teacher", teacher)
    source = Prompts(prompts, config.column, config.limit)
    prompt_list = list(source)
    manifest = Manifest(
        kind="checkpoint",
        config=asdict(config),
        seed=0,
        parents=(source.parent(output),),
        models=(record,),
        libraries=library_versions(),
    )
    day = chat_day(load_spec(teacher).tokenizer, output, manifest, overwrite)
    manifest = replace(manifest, day=day)
    require_attention(config.attention, [teacher])
    source_directory = model_directory(teacher)
    if is_adapter(source_directory):
        raise InputError(f"{teacher} is an adapter.", "Merge it into its base model, and name the merged model.")
    model = load_model(teacher, config.dtype, attention=config.attention, observer=observer)
    dtype = load_config(teacher).dtype if config.dtype == "auto" else None
    layers = DecoderLayers(teacher, model.model)
    if not 0 < config.drop < len(layers):
        raise drop_error(config.drop, teacher, len(layers))
    layers.require_description()
    sequences = [
        prompt_token_ids(model.tokenizer, prompt, day, config.max_tokens)[: config.max_tokens] for prompt in prompt_list
    ]
    require_known_ids(teacher, model.vocab, max(map(max, sequences)))
    with Writer.open(output, manifest, overwrite=overwrite) as writer, observer.writing(writer.path):
        if writer.complete:
            observer.info(f"{output} is complete: nothing to do.")
            return writer.artifact
        summary = _drop_layers(model, layers, sequences, config.drop, observer)
        measured = _log_probs(model, sequences)
        staging = writer.path / "staging.tmp"
        weights = model.model.state_dict()
        save_model(model.model.config, weights, dtype or model.model.dtype, source_directory, staging)
        model.tokenizer.save_pretrained(staging)
        del model, layers, weights  # the device may hold only one
        _require_as_measured(load_model(str(staging), config.dtype, attention=config.attention), measured, sequences)
        writer.add_directory(staging)
        staging.rmdir()
        return writer.finish(summary, observer.info)


def _drop_layers(
    model: LanguageModel, layers: DecoderLayers, sequences: list[list[int]], drop: int, observer: Observer
) -> dict[str, Any]:
    """Drop `drop` layers of the model in place. Returns their indices, and the KL after each."""
    remaining = list(range(len(layers)))
    reference = _log_probs(model, sequences)
    dropped: list[int] = []
    kl_after_each: list[float] = []
    trials = sum(len(remaining) - dropped_before for dropped_before in range(drop))
    with observer.progress("trying layers", trials, "trials") as advance, torch.inference_mode():
        for _ in range(drop):
            kl_without: dict[int, float] = {}
            for layer in remaining:
                layers.keep([other for other in remaining if other != layer])
                if layers.can_sample:
                    kl_without[layer] = _mean_kl(model, reference, sequences)
                advance(1)
            best = min(kl_without, key=lambda layer: kl_without[layer])
            remaining.remove(best)
            dropped.append(best)
            kl_after_each.append(round(kl_without[best], 4))
    layers.keep(remaining)
    return {"dropped_layers": dropped, "kl_after_each": kl_after_each, "layers": len(remaining)}


def _mean_kl(model: LanguageModel, reference: list[Tensor], sequences: list[list[int]]) -> float:
    """KL(teacher || model) per token, nats; `reference` holds the teacher's log-probabilities (tokens, vocab)."""
    divergences = [
        divergence_of(log_p, log_q, Divergence.jsd(0)).sum()
        for log_p, log_q in zip(reference, _log_probs(model, sequences), strict=True)
    ]
    kl = float(sum(divergences)) / sum(map(len, sequences))
    if not isfinite(kl):
        raise not_finite_error(model.name, model.model.dtype)
    return kl


def _log_probs(model: LanguageModel, sequences: list[list[int]]) -> list[Tensor]:
    """Log-probabilities (tokens, vocab) of each batch of sequences."""
    log_probs_by_batch = []
    with torch.inference_mode():
        for batch in batches_by_length([len(ids) for ids in sequences], tokens=FORWARD_TOKENS):
            ids, attention = pad_right([sequences[i] for i in batch])
            hidden = model.hidden(ids.to(model.device), attention.to(model.device))
            log_probs_by_batch.append(log_probs(model.head.logits(hidden[attention.bool()])))
    return log_probs_by_batch


def _require_as_measured(written: LanguageModel, measured: list[Tensor], sequences: list[list[int]]) -> None:
    """Raises TsdkdError if a model differs from the measured log-probabilities by more than rounding."""
    kl = _mean_kl(written, measured, sequences)
    if not kl <= max(ROUNDING, torch.finfo(written.model.dtype).eps):
        raise TsdkdError(
            f"The pruned model that was written differs from the one that was measured (KL {kl:.3g} nats per token).",
            "Its config does not describe its layers: use another teacher.",
        )
