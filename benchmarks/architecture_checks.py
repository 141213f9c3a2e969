"""The checks of one architecture: each runs a stage and compares its values with the reference."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.architecture_models import END_ID, ROWS, reference
from benchmarks.architecture_workspace import MismatchError, Workspace, compare, divergence
from tests.helpers.benchmark_rows import write_rows
from tsdkd.core import tsdkd_loss
from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.prune import PruneConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig, TrainConfig
from tsdkd.stages.eval.stage import evaluate
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.metrics.log import METRICS_FILE
from tsdkd.stages.models.load import load_model
from tsdkd.stages.prune import prune
from tsdkd.stages.score.stage import score
from tsdkd.stages.train import loop
from tsdkd.stages.train.stage import train_offline, train_online
from tsdkd.stages.train.trainer import DistillationTrainer

NEW_TOKENS, K, ACCEPT_K = 10, 4, 40


def check_generate(workspace: Workspace) -> None:
    """Greedy responses of a padded batch equal `model.generate` on each prompt."""
    config = GenerateConfig(temperature=0, max_new_tokens=NEW_TOKENS, engine="transformers", dtype="float32")
    generate(workspace.prompts, str(workspace.student), workspace.directory / "rollouts", config)
    for row in workspace.rows:
        prompt = torch.tensor([row["prompt_ids"]])
        suppressed = list(range(workspace.vocab, ROWS))
        output = workspace.student_reference.generate(
            prompt, do_sample=False, max_new_tokens=NEW_TOKENS, suppress_tokens=suppressed
        )
        if output[0, prompt.shape[1] :].tolist() != row["response_ids"]:
            raise MismatchError(f"{row['sample_id']}: other tokens than model.generate")


def check_speculative(workspace: Workspace) -> None:
    """Greedy drafts with the teacher's replacements equal a loop without cache and drafts."""
    config = GenerateConfig(
        policy="speculative",
        accept_k=ACCEPT_K,
        temperature=0,
        max_new_tokens=NEW_TOKENS,
        engine="transformers",
        dtype="float32",
    )
    output = workspace.directory / "speculative"
    rollouts = generate(
        workspace.prompts, str(workspace.student), output, config, teachers={"": str(workspace.teacher)}
    )
    for row in rollouts.table().to_pylist():
        ids = list(row["prompt_ids"])
        with torch.no_grad():
            while len(ids) < len(row["prompt_ids"]) + NEW_TOKENS and ids[-1] != END_ID:
                token = int(workspace.logits(workspace.student_reference, ids)[-1].argmax())
                best = workspace.logits(workspace.teacher_reference, ids)[-1].topk(ACCEPT_K).indices.tolist()
                ids.append(token if token in best else best[0])
        if ids[len(row["prompt_ids"]) :] != row["response_ids"]:
            raise MismatchError(f"{row['sample_id']}: other tokens than without drafts")


def check_score(workspace: Workspace) -> None:
    """Entropies, log-probabilities and candidates of a padded batch equal those of the reference logits."""
    scores = score(
        workspace.directory / "rollouts",
        str(workspace.student),
        str(workspace.teacher),
        workspace.directory / "scores",
        ScoreConfig(k=K, dtype="float32"),
    )
    with torch.no_grad():
        logits = {
            role: workspace.response_logits(getattr(workspace, f"{role}_reference")) for role in ("student", "teacher")
        }
    for i, (row, recorded) in enumerate(zip(workspace.rows, scores.table().to_pylist(), strict=True)):
        for role in logits:
            log_probs = logits[role][i].log_softmax(-1)
            ids = torch.tensor(row["response_ids"])
            compare(f"{role} entropy", recorded[f"{role}_entropy"], -(log_probs.exp() * log_probs).sum(-1))
            compare(f"{role} log-prob", recorded[f"{role}_log_prob"], log_probs.gather(-1, ids[:, None])[:, 0])
        candidates = torch.tensor(recorded["candidates"]).view(-1, K)
        compare("candidates", logits["student"][i].gather(-1, candidates), logits["student"][i].topk(K).values)


def objective(workspace: Workspace) -> tuple[float, float]:
    """The objective on one batch of all responses and its gradient norm, from the reference logits."""
    student = copy.deepcopy(workspace.student_reference)
    with torch.no_grad():
        teacher_logits = workspace.response_logits(workspace.teacher_reference)
    logits = workspace.response_logits(student)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in teacher_logits], batch_first=True).bool()
    pad = torch.nn.utils.rnn.pad_sequence
    loss, _ = tsdkd_loss(pad(logits, batch_first=True), pad(teacher_logits, batch_first=True), mask, TSDKDConfig(k=K))
    loss.backward()
    squares = [p.grad.square().sum() for p in student.parameters() if p.grad is not None]
    return loss.item(), math.sqrt(float(sum(squares)))


@contextmanager
def trained_logits(workspace: Workspace) -> Iterator[list[Tensor]]:
    """Yields a list that receives the logits of each trained model before it is saved."""
    original, recorded = loop.save_checkpoint, []

    def save_checkpoint(trainer: DistillationTrainer, *arguments: Any) -> None:
        with trainer.inference_student() as student:
            recorded.append(workspace.all_logits(student.model))
        original(trainer, *arguments)

    loop.save_checkpoint = save_checkpoint
    try:
        yield recorded
    finally:
        loop.save_checkpoint = original


def training(**more: Any) -> TrainConfig:
    return TrainConfig(
        objective=TSDKDConfig(k=K),
        batch_size=6,
        micro_batch_size=3,
        learning_rate=1e-3,
        warmup_ratio=0,
        epochs=1,
        precision="float32",
        **more,
    )


def train(workspace: Workspace, output: str, **more: Any) -> tuple[Path, Tensor]:
    """Train for one step and check the loss. Returns the checkpoint and the trained model's logits."""
    path = workspace.directory / output
    with trained_logits(workspace) as recorded:
        if "online" in more:
            train_online(workspace.prompts, str(workspace.student), str(workspace.teacher), path, training(**more))
        else:
            run = workspace.directory
            train_offline(run / "rollouts", run / "scores", str(workspace.student), path, training(**more))
    (step,) = [json.loads(line) for line in (path / METRICS_FILE).read_text().splitlines()]
    loss, norm = objective(workspace)
    compare("loss", step["loss"], loss)
    if "lora" not in more:
        compare("gradient norm", step["grad_norm"], norm, 1e-3)
    with torch.no_grad():
        moved = float((recorded[0] - workspace.all_logits(workspace.student_reference)).abs().max())
    if moved < 1e-3:
        raise MismatchError(f"one step moves the logits by {moved:.2g}")
    return path, recorded[0]


def check_train(workspace: Workspace) -> None:
    """Loss and gradient norm equal those of the reference logits; the saved model equals the trained one."""
    path, logits = train(workspace, "checkpoint")
    compare("saved model", workspace.all_logits(reference(path)), logits)


def check_online(workspace: Workspace) -> None:
    """Greedy responses sampled during training give the loss of the recorded ones."""
    sampling = GenerateConfig(temperature=0, max_new_tokens=NEW_TOKENS, engine="transformers")
    path, logits = train(workspace, "online", online=OnlineConfig(sampling=sampling, teacher_dtype="float32"))
    compare("saved model", workspace.all_logits(reference(path)), logits)


def check_lora(workspace: Workspace) -> None:
    """The adapter has the trained model's logits when peft loads it and when tsdkd loads it."""
    path, logits = train(workspace, "adapter", lora=LoRAConfig(rank=4))
    adapted = PeftModel.from_pretrained(reference(workspace.student), path).eval()
    compare("peft's adapter", workspace.all_logits(adapted), logits)
    compare("tsdkd's adapter", workspace.all_logits(load_model(str(path), "float32").model), logits)


def check_merge(workspace: Workspace) -> None:
    """The merged model equals peft's `merge_and_unload`."""
    path, logits = train(workspace, "merged", lora=LoRAConfig(rank=4, merge=True))
    adapter = workspace.directory / "adapter"
    merged = PeftModel.from_pretrained(reference(workspace.student), adapter).merge_and_unload().eval()
    compare("merged model in memory", workspace.all_logits(reference(path)), logits)
    compare("peft's merged model", workspace.all_logits(reference(path)), workspace.all_logits(merged))


def check_prune(workspace: Workspace) -> None:
    """The reloaded model has the divergence that `prune` measured."""
    path = workspace.directory / "pruned"
    pruned = prune(str(workspace.teacher), workspace.prompts, path, PruneConfig(drop=1, dtype="float32"))
    model = reference(path)
    with torch.no_grad():
        pairs = (
            (workspace.logits(workspace.teacher_reference, ids), workspace.logits(model, ids))
            for ids in workspace.prompt_ids
        )
        compare("divergence of the saved model", pruned.manifest.summary["kl_after_each"][-1], divergence(pairs), 1e-4)


def check_eval(workspace: Workspace) -> None:
    """The held-out divergence and a benchmark's log-likelihoods of choices equal those of the reference logits."""
    rows = write_rows(workspace.directory / "data")
    results = evaluate(
        str(workspace.student),
        workspace.directory / "results",
        EvalConfig(tasks=("sciq",), dtype="float32"),
        data=rows,
        held_out=workspace.directory,
    )
    with torch.no_grad():
        pairs = zip(
            *map(workspace.response_logits, (workspace.teacher_reference, workspace.student_reference)), strict=True
        )
        compare("held-out divergence", results.manifest.summary["held_out"]["kl"], divergence(pairs))
    tokenizer = workspace.tokenizer
    for row in results.table().to_pylist():
        text = row["prompt"].rstrip()  # lm-eval scores the white space before a choice as part of the choice
        prompt, space = tokenizer(text).input_ids, row["prompt"][len(text) :]
        for line in row["response"].splitlines():
            value, choice = line.split(" ", 1)
            ids = tokenizer(space + choice).input_ids
            with torch.no_grad():
                logits = workspace.student_reference(input_ids=torch.tensor([prompt + ids])).logits[0]
            log_probs = logits[len(prompt) - 1 : -1].log_softmax(-1)
            compare("log-likelihood", float(value), log_probs.gather(-1, torch.tensor(ids)[:, None]).sum(), 1e-3)


def check_reload(workspace: Workspace) -> None:
    """The checkpoint has the same logits in tsdkd as in transformers, also from hidden states and head."""
    path = workspace.directory / "checkpoint"
    loaded = load_model(str(path), "float32")
    expected = workspace.all_logits(reference(path))
    compare("logits", workspace.all_logits(loaded.model), expected)
    with torch.no_grad():
        ids = [torch.tensor([ids]) for ids in workspace.sequences]
        hidden = torch.cat([loaded.hidden(i, torch.ones_like(i))[0] for i in ids])
    compare("logits of the head", loaded.head.logits(hidden), expected)


CHECKS: dict[str, tuple[Callable[[Workspace], None], str | None]] = {
    "generate": (check_generate, None),
    "speculative": (check_speculative, None),
    "score": (check_score, "generate"),
    "train": (check_train, "score"),
    "reload": (check_reload, "train"),
    "online": (check_online, "generate"),
    "LoRA": (check_lora, "score"),
    "merge": (check_merge, "LoRA"),
    "prune": (check_prune, None),
    "eval": (check_eval, "score"),
}
"""Checks by column, each with the column whose artifact it reads."""
