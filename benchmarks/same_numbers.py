"""Compares the numbers of two states of the code, to the last bit: every method on tiny models at fixed seeds.

    git stash; python benchmarks/same_numbers.py before.json; git stash pop
    python benchmarks/same_numbers.py after.json --against before.json

Records the columns of rollouts and scores, metrics.jsonl and the final weights: offline and online, full and LoRA, two
processes, pruning. Bits depend on machine and versions, so both records come from one machine. Takes about a minute.
"""

import argparse
import contextlib
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors import safe_open

from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tsdkd.cli import app
from tsdkd.stages.metrics.log import METRICS_FILE

TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node=2 -m -- tsdkd"
SAMPLING = "--engine transformers --max-new-tokens 12"
TRAINING = "--precision float32 --learning-rate 1e-3 --epochs 2 --batch-size 4 --micro-batch-size 2"
BOTH = "--student {d}/student --teacher {d}/teacher"

ROLLOUTS = {
    "student": "--student {d}/student",
    "teacher": "--teacher {d}/teacher --policy teacher",
    "mixed": f"{BOTH} --policy mixed --lambda 0.5",
    "speculative": f"{BOTH} --policy speculative --accept-k 5",
    "teacher-mixed": f"{BOTH} --policy teacher-mixed",
}
SCORES = {
    "hidden": ("student", ""),
    "hidden8": ("student", "--signal hidden8"),
    "topk": ("student", "--signal topk --top-k 16"),
    "ranks": ("student", "--signal ranks"),
    "teacher": ("teacher", ""),
    "speculative": ("speculative", ""),
    "teacher-mixed": ("teacher-mixed", ""),
}
OFFLINE = {
    "tsdkd": ("student", "hidden", "--k 4"),
    "tsdkd-adaptive": ("student", "hidden", "--k 4 --opener adaptive"),
    "tsdkd-sum": ("student", "hidden", "--k 4 --indirect-reduction sum --no-gate"),
    "tsdkd-lora": ("student", "hidden", "--k 4 --lora --lora-rank 4"),
    "tsdkd-lora-merge": ("student", "hidden", "--k 4 --lora --lora-rank 4 --merge"),
    "tsdkd-compile": ("student", "hidden", "--k 4 --compile"),
    "tsdkd-held-out": ("student", "hidden", "--k 4 --held-out 0.3 --eval-steps 2"),
    "tsdkd-checkpointing": ("student", "hidden", "--k 4 --gradient-checkpointing"),
    "tsdkd-bfloat16": ("student", "hidden", "--k 4 --precision bfloat16"),
    "tsdkd-released": ("student", "hidden", "--k 4 --method tsdkd-released"),
    "tsdkd-hidden8": ("student", "hidden8", "--k 4"),
    "tsdkd-topk": ("student", "topk", "--k 4"),
    "tsdkd-ranks": ("student", "ranks", "--k 4 --direct-weight 0"),
    "gkd": ("student", "hidden", "--method gkd"),
    "gkd-lora": ("student", "hidden", "--method gkd --lora"),
    "reverse-kl": ("student", "hidden", "--method reverse-kl"),
    "skew-kl": ("student", "hidden", "--method skew-kl"),
    "skew-reverse-kl": ("student", "hidden", "--method skew-reverse-kl"),
    "seqkd": ("teacher", None, "--method seqkd --student {d}/student"),
    "supervised-kd": ("teacher", "teacher", "--method supervised-kd"),
    "skd": ("speculative", "speculative", "--method skd"),
    "minillm": ("teacher-mixed", "teacher-mixed", "--method minillm"),
}
ONLINE = {
    "tsdkd": "--k 4",
    "tsdkd-lora": "--k 4 --lora",
    "tsdkd-adaptive": "--k 4 --opener adaptive",
    "tsdkd-held-out": "--k 4 --held-out 0.3 --eval-steps 2",
    "tsdkd-released": "--k 4 --method tsdkd-released",
    "gkd": "--method gkd",
    "reverse-kl": "--method reverse-kl",
    "skew-kl": "--method skew-kl",
    "minillm": "--method minillm",
}
ONLINE_FROM_ROLLOUTS = {
    "gkd-mixed": "--method gkd --lambda 0.5",
    "distillm": "--method distillm --phi 0.5 --replay-capacity 4 --replay-tolerance 0 --held-out 0.3 --eval-steps 2",
}


def commands() -> Iterator[tuple[str, str, bool]]:
    """The directory that a command writes, the command, and whether two processes run it."""
    prompts = "--prompts {d}/prompts.jsonl"
    for name, options in ROLLOUTS.items():
        yield f"rollouts-{name}", f"generate --rollouts {{out}} {prompts} {SAMPLING} --part-size 4 {options}", False
    for name, (rollouts, options) in SCORES.items():
        yield (
            f"scores-{name}",
            f"score --rollouts {{d}}/rollouts-{rollouts} --scores {{out}} {BOTH} --k 4 {options}",
            False,
        )
    for name, (rollouts, scores, options) in OFFLINE.items():
        recorded = f"--rollouts {{d}}/rollouts-{rollouts}" + (f" --scores {{d}}/scores-{scores}" if scores else "")
        yield f"offline-{name}", f"train {recorded} --checkpoint {{out}} {TRAINING} {options}", False
    for name, options in ONLINE.items():
        yield f"online-{name}", f"train {prompts} {BOTH} --checkpoint {{out}} {SAMPLING} {TRAINING} {options}", False
    for name, options in ONLINE_FROM_ROLLOUTS.items():
        recorded = "--rollouts {d}/rollouts-teacher"
        yield f"online-{name}", f"train {recorded} {BOTH} --checkpoint {{out}} {SAMPLING} {TRAINING} {options}", False
    scored = f"score --rollouts {{d}}/rollouts-student --scores {{out}} {BOTH} --k 4"
    yield "two-scores", f"{scored} --data-parallel 2", False
    recorded = "--rollouts {d}/rollouts-student --scores {d}/scores-hidden"
    yield "two-offline", f"train {recorded} --checkpoint {{out}} {TRAINING} --k 4", True
    yield "two-online", f"train {prompts} {BOTH} --checkpoint {{out}} {SAMPLING} {TRAINING} --k 4", True
    yield "pruned", f"prune --teacher {{d}}/teacher {prompts} --drop 2 --dtype float32 --output {{out}}", False


def run(command: str, two_processes: bool) -> None:
    if two_processes:
        words = [sys.executable, *TORCHRUN.split(), *command.split()]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{command}\n{done.stderr}")
        return
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            app(command.split(), standalone_mode=False)
        except SystemExit as end:
            if end.code:
                raise SystemExit(f"{command}\n{shown.getvalue()}") from None


def numbers(artifact: Path) -> dict[str, Any]:
    """Hashes of columns and tensors, and the metrics as they are."""
    recorded: dict[str, Any] = {}
    for file in sorted(artifact.glob("*.parquet")):
        table = pq.read_table(file)
        for name in table.column_names:
            values = json.dumps(table[name].to_pylist(), default=bytes.hex)
            recorded[f"{file.name} {name}"] = hashlib.sha256(values.encode()).hexdigest()[:16]
    for file in sorted(artifact.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                content = tensors.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
                recorded[f"{file.name} {name}"] = hashlib.sha256(content).hexdigest()[:16]
    metrics = artifact / METRICS_FILE
    if metrics.exists():
        recorded["metrics"] = [json.loads(line) for line in metrics.read_text().splitlines()]
    return recorded


def record() -> dict[str, Any]:
    torch.set_num_threads(1)
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        save_tiny_model(directory / "teacher", seed=1, layers=4, width=48, padding_rows=14)
        save_tiny_model(directory / "student", seed=2)
        write_prompts(directory / "prompts.jsonl", 11)
        recorded = {}
        for name, command, two_processes in commands():
            run(command.format(d=directory, out=directory / name), two_processes)
            recorded[name] = numbers(directory / name)
            print(f"{name}: {len(recorded[name])} values")
    return recorded


def by_metric(recorded: dict[str, Any]) -> dict[str, Any]:
    """Replace the log of one command by the values of each metric."""
    log = recorded.get("metrics", [])
    names = dict.fromkeys(name for entry in log for name in entry)
    others = {key: value for key, value in recorded.items() if key != "metrics"}
    return others | {f"metrics {name}": [entry.get(name) for entry in log] for name in names}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    names = dict.fromkeys([*before, *after])
    pairs = {name: (by_metric(before.get(name, {})), by_metric(after.get(name, {}))) for name in names}
    return [
        f"{name}: {key}" + (" is new" if key not in one else " is gone" if key not in other else "")
        for name, (one, other) in pairs.items()
        for key in dict.fromkeys([*one, *other])
        if one.get(key) != other.get(key)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="file to write")
    parser.add_argument("--against", type=Path, help="an earlier record to compare with")
    options = parser.parse_args()
    recorded = record()
    options.record.write_text(json.dumps(recorded, indent=1))
    if options.against:
        different = differences(json.loads(options.against.read_text()), recorded)
        print(*different, sep="\n")
        print(f"{len(recorded)} runs, {sum(map(len, recorded.values()))} values, {len(different)} differ")
        raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
