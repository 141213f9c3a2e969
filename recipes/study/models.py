"""The study's models, trained from scratch on the task: one teacher, and students of several competences."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.study import task
from tsdkd.stages.engines.transformers_engine import sample_responses
from tsdkd.stages.models.load import LanguageModel


@dataclass(frozen=True)
class Shape:
    width: int
    inner: int
    layers: int
    rate: float
    """Of learning, at its highest."""
    steps: int
    """At most."""
    batch: int = 32


TEACHER = Shape(width=96, inner=256, layers=3, rate=2e-3, steps=1000)
STUDENT = Shape(width=48, inner=144, layers=2, rate=1.5e-3, steps=2000)
EVERY = 10
"""Steps between measurements."""


def make(
    shape: Shape, seed: int, places: dict[int, Path], dev: list[str], advance: Callable[[int], None], *, decay: bool
) -> None:
    """Train a model on solutions and save it at each of `places`, as soon as its accuracy in % reaches the key.

    `decay`: the learning rate falls to zero over all steps. Raises RuntimeError where an accuracy is not reached.
    """
    torch.manual_seed(seed)
    model, tokenizer = _fresh(shape), task.tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.rate, betas=(0.9, 0.98))
    fall = (lambda step: 1 - step / shape.steps) if decay else (lambda _: 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * fall(step))
    draw, source = random.Random(seed), task.problems(1000 + seed, frozenset(dev))
    left, reached = sorted(places), 0.0
    for step in range(1, shape.steps + 1):
        chosen = [next(source) for _ in range(shape.batch)]
        _step(model, tokenizer, chosen, draw)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        advance(1)
        if step % EVERY == 0:
            reached = 100 * accuracy(LanguageModel("in training", model, tokenizer), dev)
            while left and reached >= left[0]:
                _save(model, tokenizer, places[left.pop(0)])
            if not left:
                return
    raise RuntimeError(f"The model reached {reached:.0f} %, not {left[0]} %: raise its steps.")


def accuracy(model: LanguageModel, problems: list[str]) -> float:
    """Share of problems answered rightly, greedily."""
    prompts = [model.tokenizer(problem).input_ids for problem in problems]
    answers = sample_responses(model, prompts, task.ANSWER_TOKENS, temperature=0)
    texts = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    return sum(map(task.is_right, problems, texts)) / len(problems)


def _fresh(shape: Shape) -> LlamaForCausalLM:
    """First values five times as wide as usual: the task is learned in hundreds of steps then, not thousands."""
    end = task.tokenizer().eos_token_id
    config = LlamaConfig(
        vocab_size=end + 1,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def _step(model: LlamaForCausalLM, tokenizer: object, chosen: list[str], draw: random.Random) -> None:
    """Gradients of the solutions' cross-entropy; all sequences have one length."""
    ids = torch.tensor(tokenizer([p + task.solution(p, draw) + task.END for p in chosen]).input_ids)
    labels = ids.clone()
    labels[:, : len(chosen[0])] = -100
    model.zero_grad()
    model(input_ids=ids, labels=labels).loss.backward()


def _save(model: LlamaForCausalLM, tokenizer: object, place: Path) -> None:
    """Whole, or not at all; what an interrupted run has saved is the same."""
    if place.is_dir():
        return
    aside = place.with_suffix(".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(place)
