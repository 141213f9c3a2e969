"""Models that are trained from scratch on a task: a teacher, and students of several accuracies."""

import random
import shutil
from collections.abc import Callable, Sequence
from itertools import cycle
from operator import add
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.experiment.task import END, Shape, Task
from tsdkd.stages.engines.transformers_engine import sample_responses
from tsdkd.stages.models.language_model import LanguageModel

Goals = Sequence[tuple[int, Path]]
"""Accuracies in percent, each with the directory of the model that reaches it."""


def make(
    task: Task,
    shape: Shape,
    seed: int,
    goals: Goals,
    dev: list[str],
    without: list[str],
    advance: Callable[[float], None],
    *,
    decay: bool,
) -> None:
    """Train a model on solutions and save it in each goal's directory once it reaches the goal's accuracy in percent.

    dev: problems that measure the accuracy. without: problems that the model does not learn from, with dev among them.
    advance: called after each step with the last measured accuracy in percent. decay: the learning rate falls linearly
    to zero. Raises RuntimeError where a goal is not reached.
    """
    torch.manual_seed(seed)
    model, tokenizer = _new_model(task, shape), task.tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.rate, betas=(0.9, 0.98))
    decayed = (lambda step: 1 - step / shape.steps) if decay else (lambda _: 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * decayed(step))
    generator, source = random.Random(seed), task.problems(1000 + seed, without)
    remaining, reached = sorted(goals), 0.0
    for step in range(1, shape.steps + 1):
        chosen = [next(source) for _ in range(shape.batch)]
        _step(task, model, tokenizer, chosen, generator)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % shape.every == 0:
            reached = 100 * accuracy(task, LanguageModel("in training", model, tokenizer), dev)
            while remaining and reached >= remaining[0][0]:
                _save(model, tokenizer, remaining.pop(0)[1])
        advance(reached)
        if not remaining:
            return
    raise RuntimeError(f"The model reached {reached:.0f} %, not {remaining[0][0]} %: raise its steps.")


def accuracy(task: Task, model: LanguageModel, problems: list[str]) -> float:
    """The fraction of problems with a correct greedy response after one of the task's beginnings, in turn.

    A greedy response alone would always choose one beginning, perhaps the only one that the model has learned.
    """
    texts = map(add, problems, cycle(task.beginnings))
    prompts = [model.tokenizer(text).input_ids for text in texts]
    responses = sample_responses(model, prompts, task.response_tokens, temperature=0)
    texts = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    return sum(map(task.is_correct, problems, texts)) / len(problems)


def _new_model(task: Task, shape: Shape) -> LlamaForCausalLM:
    """A model with five times the usual initializer range, which learns the task in hundreds of steps."""
    end = task.tokenizer().eos_token_id
    config = LlamaConfig(
        vocab_size=end + 1,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        max_position_embeddings=task.context,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def _step(task: Task, model: LlamaForCausalLM, tokenizer: object, chosen: list[str], generator: random.Random) -> None:
    """Compute the gradients of the cross-entropy of solutions; all sequences have the same length."""
    ids = torch.tensor(tokenizer([p + task.solution(p, generator) + END for p in chosen]).input_ids)
    labels = ids.clone()
    labels[:, : len(chosen[0])] = -100
    model.zero_grad()
    model(input_ids=ids, labels=labels).loss.backward()


def _save(model: LlamaForCausalLM, tokenizer: object, directory: Path) -> None:
    """Save atomically; a model that an interrupted run saved is kept."""
    if directory.is_dir():
        return
    temporary = directory.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(directory)
