"""Runs every stage on tiny models of many architectures and compares each with plain transformers and peft.

    python benchmarks/architectures.py [--only NAME ...] [--markdown docs/architectures.md]

The reference reads one sequence at a time in float32, without padding, cache or tsdkd. A cell of the table is "ok", or
"refused" with tsdkd's reason, or "FAILED". The exit status is 1 if a cell is FAILED. Takes about five minutes.
"""

import argparse
import copy
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tests.helpers.benchmark_rows import write_rows
from tests.helpers.models import byte_tokenizer
from tests.helpers.prompts import write_prompts
from tsdkd.artifacts.reader import read_artifact
from tsdkd.core import tsdkd_loss
from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import TsdkdError, first_line
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.prune import PruneConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig, TrainConfig
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.eval.stage import evaluate
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.metrics.log import METRICS_FILE
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.tokenizers import chat_token_ids, load_tokenizer, vocab_size
from tsdkd.stages.prune import prune
from tsdkd.stages.score.stage import score
from tsdkd.stages.train import loop
from tsdkd.stages.train.stage import train_offline, train_online
from tsdkd.stages.train.trainer import DistillationTrainer

ROWS = 264
"""Rows of the output head; the last few are padding."""
TOLERANCE = 5e-5
"""Nats, or logits of a standard deviation of about 1."""
NEW_TOKENS, K, ACCEPT_K = 10, 4, 40
SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
SLIDING = {"sliding_window": 6}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama4_text": {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 64},
    "mistral": SLIDING,
    "ministral": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": EXPERTS | {"head_dim": 8},
    "qwen3_next": EXPERTS
    | {
        "head_dim": 8,
        "num_hidden_layers": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 16,
    },
    "gemma": {"head_dim": 8},
    "gemma2": SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {},
    "smollm3": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 2]],
        "num_layers": 4,
        "num_hidden_layers": 4,
        "window_size": 6,
    },
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4},
    "gpt_bigcode": {},
    "codegen": {"rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {},
    "falcon": {},
    "mpt": {},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": {"state_size": 8},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "jamba": {"num_experts": 2, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": MAMBA2 | {"attn_layer_indices": [1], "mamba_chunk_size": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 16},
    "rwkv": {"attention_hidden_size": 32},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "granitemoe": {"num_local_experts": 4},
    "granitemoehybrid": MAMBA2
    | {"layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 4, "shared_intermediate_size": 16},
    "cohere": {},
    "cohere2": SLIDING | {"head_dim": 8},
    "deepseek_v2": LATENT
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 4},
    "deepseek_v3": LATENT
    | {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": SLIDING | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "starcoder2": {},
    "stablelm": {},
    "nemotron": {"head_dim": 8},
    "exaone4": {"head_dim": 8},
    "ernie4_5": {"head_dim": 8},
    "helium": {"head_dim": 8},
}
NAMES = {"falcon": {"head_dim"}}


class MismatchError(Exception):
    """A stage's values differ from the reference."""


def compare(what: str, values: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    values, expected = torch.as_tensor(values).double(), torch.as_tensor(expected).double()
    if values.shape != expected.shape:
        raise MismatchError(f"{what}: shape {tuple(values.shape)}, expected {tuple(expected.shape)}")
    largest = float((values - expected).abs().max())
    if not largest <= tolerance * max(1, float(expected.abs().max())):
        raise MismatchError(f"{what}: differs by {largest:.2g}")


def save_model(name: str, directory: Path, seed: int) -> None:
    """A random model with values in every parameter: no bias is 0, no norm is 1."""
    torch.manual_seed(seed)
    known = AutoConfig.for_model(name)
    sizes = {field: value for field, value in SIZES.items() if hasattr(known, field)}  # configs keep unknown fields
    config = AutoConfig.for_model(name, **(sizes | ARCHITECTURES[name]))
    for field in config.to_dict():
        if "drop" in field and isinstance(getattr(config, field), float):
            setattr(config, field, 0.0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


def reference(directory: Path) -> PreTrainedModel:
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


@dataclass
class Laboratory:
    """Two models of one architecture, and the artifacts that the checks write and read, in one directory."""

    directory: Path
    architecture: str

    def __post_init__(self) -> None:
        write_prompts(self.prompts, 6)
        save_model(self.architecture, self.student, 1)
        save_model(self.architecture, self.teacher, 2)

    @property
    def prompts(self) -> Path:
        return self.directory / "prompts.jsonl"

    @property
    def student(self) -> Path:
        return self.directory / "student"

    @property
    def teacher(self) -> Path:
        return self.directory / "teacher"

    @cached_property
    def student_reference(self) -> PreTrainedModel:
        return reference(self.student)

    @cached_property
    def teacher_reference(self) -> PreTrainedModel:
        return reference(self.teacher)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(str(self.student))

    @cached_property
    def vocab(self) -> int:
        """The tokenizer's ids; some tokenizer classes add one."""
        return vocab_size(self.tokenizer)

    @cached_property
    def prompt_ids(self) -> list[list[int]]:
        return [chat_token_ids(self.tokenizer, prompt.messages) for prompt in Prompts(self.prompts)]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return read_artifact(self.directory / "rollouts", "rollouts").table().to_pylist()

    @cached_property
    def sequences(self) -> list[list[int]]:
        return [row["prompt_ids"] + row["response_ids"] for row in self.rows]

    def logits(self, model: Any, ids: list[int]) -> Tensor:
        """(seq, vocab) of one sequence."""
        logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :, : self.vocab].float()
        return logits

    def response_logits(self, model: Any) -> list[Tensor]:
        """(tokens, vocab) of each response."""
        return [
            self.logits(model, ids)[len(row["prompt_ids"]) - 1 : -1]
            for row, ids in zip(self.rows, self.sequences, strict=True)
        ]

    def all_logits(self, model: Any) -> Tensor:
        """Of every position of prompts and responses."""
        with torch.no_grad():
            return torch.cat([self.logits(model, ids) for ids in self.sequences])


def check_generate(lab: Laboratory) -> None:
    """Greedy responses of a padded batch are those of `model.generate`, prompt by prompt."""
    config = GenerateConfig(temperature=0, max_new_tokens=NEW_TOKENS, engine="transformers", dtype="float32")
    generate(lab.prompts, str(lab.student), lab.directory / "rollouts", config)
    for row in lab.rows:
        prompt = torch.tensor([row["prompt_ids"]])
        suppressed = list(range(lab.vocab, ROWS))
        output = lab.student_reference.generate(
            prompt, do_sample=False, max_new_tokens=NEW_TOKENS, suppress_tokens=suppressed
        )
        if output[0, prompt.shape[1] :].tolist() != row["response_ids"]:
            raise MismatchError(f"{row['sample_id']}: other tokens than model.generate")


def check_joint(lab: Laboratory) -> None:
    """Greedy drafts with the teacher's replacements are those of a loop without cache and drafts."""
    config = GenerateConfig(
        policy="speculative",
        accept_k=ACCEPT_K,
        temperature=0,
        max_new_tokens=NEW_TOKENS,
        engine="transformers",
        dtype="float32",
    )
    output = lab.directory / "speculative"
    rollouts = generate(lab.prompts, str(lab.student), output, config, teacher=str(lab.teacher))
    for row in rollouts.table().to_pylist():
        ids = list(row["prompt_ids"])
        with torch.no_grad():
            while len(ids) < len(row["prompt_ids"]) + NEW_TOKENS and ids[-1] != SIZES["eos_token_id"]:
                token = int(lab.logits(lab.student_reference, ids)[-1].argmax())
                best = lab.logits(lab.teacher_reference, ids)[-1].topk(ACCEPT_K).indices.tolist()
                ids.append(token if token in best else best[0])
        if ids[len(row["prompt_ids"]) :] != row["response_ids"]:
            raise MismatchError(f"{row['sample_id']}: other tokens than token by token")


def check_score(lab: Laboratory) -> None:
    """Entropies, log-probabilities and candidates of a padded batch are those of the logits."""
    scores = score(
        lab.directory / "rollouts",
        str(lab.student),
        str(lab.teacher),
        lab.directory / "scores",
        ScoreConfig(k=K, dtype="float32"),
    )
    with torch.no_grad():
        logits = {role: lab.response_logits(getattr(lab, f"{role}_reference")) for role in ("student", "teacher")}
    for i, (row, recorded) in enumerate(zip(lab.rows, scores.table().to_pylist(), strict=True)):
        for role in logits:
            log_probs = logits[role][i].log_softmax(-1)
            ids = torch.tensor(row["response_ids"])
            compare(f"{role} entropy", recorded[f"{role}_entropy"], -(log_probs.exp() * log_probs).sum(-1))
            compare(f"{role} log-prob", recorded[f"{role}_log_prob"], log_probs.gather(-1, ids[:, None])[:, 0])
        candidates = torch.tensor(recorded["candidates"]).view(-1, K)
        compare("candidates", logits["student"][i].gather(-1, candidates), logits["student"][i].topk(K).values)


def objective(lab: Laboratory) -> tuple[float, float]:
    """The objective of one batch of all responses, and the norm of its gradient, from logits of transformers."""
    student = copy.deepcopy(lab.student_reference)
    with torch.no_grad():
        taught = lab.response_logits(lab.teacher_reference)
    logits = lab.response_logits(student)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in taught], batch_first=True).bool()
    pad = torch.nn.utils.rnn.pad_sequence
    loss, _ = tsdkd_loss(pad(logits, batch_first=True), pad(taught, batch_first=True), mask, TSDKDConfig(k=K))
    loss.backward()
    squares = [p.grad.square().sum() for p in student.parameters() if p.grad is not None]
    return float(loss), math.sqrt(float(sum(squares)))


@contextmanager
def trained_logits(lab: Laboratory) -> Iterator[list[Tensor]]:
    """Receives the logits of each model in memory before it is saved."""
    original, recorded = loop.save_checkpoint, []

    def save_checkpoint(trainer: DistillationTrainer, *arguments: Any) -> None:
        with trainer.inference_student() as student:
            recorded.append(lab.all_logits(student.model))
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


def train(lab: Laboratory, output: str, **more: Any) -> tuple[Path, Tensor]:
    """The checkpoint of one step, and the trained model's logits in memory. Checks the loss."""
    path = lab.directory / output
    with trained_logits(lab) as recorded:
        if "online" in more:
            train_online(lab.prompts, str(lab.student), str(lab.teacher), path, training(**more))
        else:
            run = lab.directory
            train_offline(run / "rollouts", run / "scores", str(lab.student), path, training(**more))
    (step,) = [json.loads(line) for line in (path / METRICS_FILE).read_text().splitlines()]
    loss, norm = objective(lab)
    compare("loss", step["loss"], loss)
    if "lora" not in more:
        compare("gradient norm", step["grad_norm"], norm, 1e-3)
    with torch.no_grad():
        moved = float((recorded[0] - lab.all_logits(lab.student_reference)).abs().max())
    if moved < 1e-3:
        raise MismatchError(f"one step moves the logits by {moved:.2g}")
    return path, recorded[0]


def check_train(lab: Laboratory) -> None:
    """The loss and the gradient's norm are those of the logits; the saved model is the trained one."""
    path, logits = train(lab, "checkpoint")
    compare("saved model", lab.all_logits(reference(path)), logits)


def check_online(lab: Laboratory) -> None:
    """Greedy responses during training have the loss of the recorded ones."""
    sampling = GenerateConfig(temperature=0, max_new_tokens=NEW_TOKENS, engine="transformers")
    path, logits = train(lab, "online", online=OnlineConfig(sampling=sampling, teacher_dtype="float32"))
    compare("saved model", lab.all_logits(reference(path)), logits)


def check_lora(lab: Laboratory) -> None:
    """The adapter that peft loads is the trained one, and the one that tsdkd loads."""
    path, logits = train(lab, "adapter", lora=LoRAConfig(rank=4))
    adapted = PeftModel.from_pretrained(reference(lab.student), path).eval()
    compare("peft's adapter", lab.all_logits(adapted), logits)
    compare("tsdkd's adapter", lab.all_logits(load_model(str(path), "float32").model), logits)


def check_merge(lab: Laboratory) -> None:
    """The merged model is the adapter's `merge_and_unload`."""
    path, logits = train(lab, "merged", lora=LoRAConfig(rank=4, merge=True))
    adapter = lab.directory / "adapter"
    merged = PeftModel.from_pretrained(reference(lab.student), adapter).merge_and_unload().eval()
    compare("merged model in memory", lab.all_logits(reference(path)), logits)
    compare("peft's merged model", lab.all_logits(reference(path)), lab.all_logits(merged))


def check_prune(lab: Laboratory) -> None:
    """The reloaded model has the divergence that was measured."""
    path = lab.directory / "pruned"
    pruned = prune(str(lab.teacher), lab.prompts, path, PruneConfig(drop=1, dtype="float32"))
    model = reference(path)
    with torch.no_grad():
        pairs = [[lab.logits(m, ids).log_softmax(-1) for m in (lab.teacher_reference, model)] for ids in lab.prompt_ids]
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean()
    compare("divergence of the saved model", pruned.manifest.summary["kl_after_each"][-1], kl, 1e-4)


def check_eval(lab: Laboratory) -> None:
    """The held-out divergence and the log-likelihoods of a benchmark's choices are those of the logits."""
    rows = write_rows(lab.directory / "data")
    results = evaluate(
        str(lab.student),
        lab.directory / "results",
        EvalConfig(tasks=("sciq",), dtype="float32"),
        data=rows,
        held_out=lab.directory,
    )
    with torch.no_grad():
        pairs = [map(lab.response_logits, (lab.teacher_reference, lab.student_reference))]
        log_p, log_q = ([x.log_softmax(-1) for x in logits] for (logits) in next(map(tuple, pairs)))
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(log_p, log_q, strict=True)]).mean()
    compare("held-out divergence", results.manifest.summary["held_out"]["kl"], kl)
    tokenizer = lab.tokenizer
    for row in results.table().to_pylist():
        text = row["prompt"].rstrip()  # lm-eval scores the white space before a choice with it
        prompt, space = tokenizer(text).input_ids, row["prompt"][len(text) :]
        for line in row["response"].splitlines():
            value, choice = line.split(" ", 1)
            ids = tokenizer(space + choice).input_ids
            with torch.no_grad():
                logits = lab.student_reference(input_ids=torch.tensor([prompt + ids])).logits[0]
            log_probs = logits[len(prompt) - 1 : -1].log_softmax(-1)
            compare("log-likelihood", float(value), log_probs.gather(-1, torch.tensor(ids)[:, None]).sum(), 1e-3)


def check_reload(lab: Laboratory) -> None:
    """The checkpoint that tsdkd loads has the logits that transformers loads, from hidden states and head too."""
    path = lab.directory / "checkpoint"
    loaded = load_model(str(path), "float32")
    expected = lab.all_logits(reference(path))
    compare("logits", lab.all_logits(loaded.model), expected)
    with torch.no_grad():
        ids = [torch.tensor([ids]) for ids in lab.sequences]
        hidden = torch.cat([loaded.hidden(i, torch.ones_like(i))[0] for i in ids])
    compare("logits of the head", loaded.head.logits(hidden), expected)


DIFFERS = "FAILED (differs): "
CHECKS: dict[str, tuple[Callable[[Laboratory], None], str | None]] = {
    "generate": (check_generate, None),
    "speculative": (check_joint, None),
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


def run_checks(architecture: str, tracebacks: list[str]) -> dict[str, str]:
    """The cells of one row."""
    cells: dict[str, str] = {}
    with TemporaryDirectory() as directory:
        try:
            lab = Laboratory(Path(directory), architecture)
        except Exception as error:
            tracebacks.append(f"## {architecture}\n\n```\n{traceback.format_exc()}```\n")
            return {"model": f"FAILED: {type(error).__name__}: {first_line(error)}"}
        for column, (check, needed) in CHECKS.items():
            if needed and not cells[needed].startswith(("ok", DIFFERS)):
                cells[column] = "–"
                continue
            try:
                check(lab)
                cells[column] = "ok"
            except TsdkdError as error:
                cells[column] = f"refused: {error.cause}"
            except Exception as error:
                cells[column] = DIFFERS if isinstance(error, MismatchError) else "FAILED: "
                cells[column] += f"{type(error).__name__}: {first_line(error)}"
                tracebacks.append(
                    f"## {architecture}, {column}\n\n{cells[column]}\n\n```\n{traceback.format_exc()}```\n"
                )
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), metavar="NAME")
    parser.add_argument("--tracebacks", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    failures: list[str] = []
    for name in options.only:
        print(name, end=" ", flush=True)
        start = datetime.now(UTC)
        cells = run_checks(name, failures)
        print((datetime.now(UTC) - start).seconds, "s")
        for column, cell in cells.items():
            if cell != "ok":
                print(f"    {column}: {cell}", flush=True)
        if options.tracebacks:
            options.tracebacks.write_text("\n".join(failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
