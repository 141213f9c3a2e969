"""Writes run directories like those of the stages, without models, to test reports."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from tsdkd.artifacts.hashing import file_digest
from tsdkd.artifacts.manifest import Manifest, ModelRecord, Parent, load_manifest
from tsdkd.artifacts.schemas import SCHEMAS
from tsdkd.artifacts.writer import Writer
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.methods import find_method

STUDENT = ModelRecord("student", "models/small", "a" * 64, "t", "c")
TEACHER = ModelRecord("teacher", "models/large", "b" * 64, "t", "c")
MARKUP = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\"> & {{ 7 * 7 }}"
KEYS = [
    *("loss", "indirect", "direct", "entropy", "student_entropy", "teacher_entropy", "top1_agreement"),
    *("rank_agreement", "candidate_overlap", "drift", "gate", "response_length", "opener_length"),
    *("truncated", "repeating", "grad_norm", "learning_rate", "student_outside_mass", "teacher_outside_mass"),
    *("indirect_grad_share", "direct_grad_share", "entropy_grad_share", "policy_gradient_grad_share"),
]
VERDICTS = {"teacher": "1111", "student": "1100", "distilled": "0111"}
"""Scores of four documents: the distilled model lost the first and gained the last two."""


def log(steps: int, measured: int = 0, divergence: str = "eval_kl") -> list[dict[str, float]]:
    """Each metric logs its number in `KEYS`, plus a thousandth per step; `measured`: steps between measurements."""
    entries = []
    for step in range(1, steps + 1):
        entry = {name: number + step / 1000 for number, name in enumerate(KEYS, 1)}
        entries.append({**entry, "repeating": 0.0, "step": step})
        if measured and step % measured == 0:
            held_out = {
                divergence: 2 / step,
                "eval_top1_agreement": 0.5 + step / 1000,
                "eval_student_entropy": 3 + step / 1000,
            }
            entries.append({**held_out, "step": step})
    return entries


def make_run(directory: Path, *, seed: int = 0, steps: int = 8, response: str = MARKUP, **objective: Any) -> Path:
    """A complete run; `objective`: settings that differ from the paper's."""
    rollouts(directory, seed, response)
    scores(directory)
    checkpoint(directory, seed, log(steps, 4), **objective)
    for name, verdicts in VERDICTS.items():
        results(directory, name, verdicts, response)
    return directory


def rollouts(directory: Path, seed: int = 0, response: str = MARKUP) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    prompts = directory / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n')
    manifest = Manifest(
        kind="rollouts",
        config=asdict(GenerateConfig(temperature=0.5, max_new_tokens=32, part_size=256, engine="transformers")),
        seed=seed,
        parents=(Parent("prompts", file_digest(prompts), "../prompts.jsonl"),),
        models=(STUDENT,),
    )
    rows = [
        {
            "sample_id": f"p{i}-0",
            "prompt_id": f"p{i}",
            "messages": [{"role": "user", "content": f"Question {i}? {MARKUP}"}],
            "response": f"{response} by seed {seed}",
            "source": "prompts.jsonl",
            "prompt_ids": [1],
            "response_ids": [2],
            "finish_reason": "stop",
            "author": "student",
            "teacher_tokens": 0,
        }
        for i in range(4)
    ]
    with Writer.open(directory / "rollouts", manifest) as writer:
        writer.write_table("part-00000.parquet", _table("rollouts", rows))
        counts = {"responses": 4, "response_tokens": 1234, "teacher_tokens": 0, "truncated": 1}
        writer.finish({"prompts": 4, "prompts_skipped": {}, **counts})


def scores(directory: Path) -> None:
    parent = Parent("rollouts", _fingerprint(directory / "rollouts"), "../rollouts")
    manifest = Manifest("scores", asdict(ScoreConfig()), 0, (parent,), (STUDENT, TEACHER))
    with Writer.open(directory / "scores", manifest) as writer:
        writer.write_table("part-00000.parquet", _table("scores", [{"sample_id": f"p{i}-0"} for i in range(4)]))
        writer.finish({"response_tokens": 1234})


def checkpoint(
    directory: Path, seed: int, entries: list[dict[str, float]], method: str = "tsdkd", **objective: Any
) -> None:
    method_objective = replace(find_method(method).objective, **objective)
    config = asdict(TrainConfig(method=method, objective=method_objective, batch_size=8, epochs=1.0)) | {
        "precision": "float32"
    }
    del config["trackers"], config["save_steps"]
    parents = tuple(Parent(kind, _fingerprint(directory / kind), f"../{kind}") for kind in ("rollouts", "scores"))
    manifest = Manifest("checkpoint", config, seed, parents, (STUDENT, TEACHER))
    with Writer.open(directory / "checkpoint", manifest) as writer:
        writer.temporary_path("metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        writer.add_file("metrics.jsonl")
        writer.finish({"steps": sum("loss" in entry for entry in entries)})


def results(directory: Path, name: str, verdicts: str, response: str = "", first: int = 0, weight: float = 1.0) -> None:
    """Results of the model `name`: one verdict, 0 or 1, per document; `first`: number of the first document."""
    model = ModelRecord("evaluated", f"models/{name}", name, "t", "c")
    manifest = Manifest("results", asdict(EvalConfig(tasks=("gsm8k",))), 0, (), (model,))
    metric = "exact_match,flexible-extract"
    rows = [
        {
            "task": "gsm8k",
            "subtask": "gsm8k",
            "document": i,
            "document_hash": str(i),
            "metric": metric,
            "prompt": f"How many? {MARKUP}",
            "response": f"{name} responds {i} {response}",
            "target": str(i),
            "score": float(verdict),
            "truncated": False,
            "weight": weight,
        }
        for i, verdict in enumerate(verdicts, first)
    ]
    mean, count = verdicts.count("1") / len(verdicts), len(verdicts)
    held_out = {"responses": 64, "kl": len(name) / 10, "kl_stderr": 0.01, "top1_agreement": 0.75, "entropy": 2.0}
    with Writer.open(directory / "results" / name, manifest) as writer:
        writer.write_table("gsm8k.parquet", _table("results", rows))
        benchmark = {
            "metric": metric,
            "value": mean,
            "stderr": 0.125,
            "documents": count,
            "shots": 5,
            "other_metrics": {},
        }
        held_out |= {"prompt": MARKUP, "response": f"{name} responds {MARKUP}"}
        writer.finish({"gsm8k": {**benchmark, "truncated": 1, "prompts_truncated": 0}, "held_out": held_out})


def _table(kind: str, rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([{**dict.fromkeys(SCHEMAS[kind].names), **row} for row in rows], SCHEMAS[kind])


def _fingerprint(path: Path) -> str:
    return load_manifest(path).fingerprint
