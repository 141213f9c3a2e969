"""record: what tiny models give at fixed seeds (old words)."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TSDKD_X="1")
import pyarrow.parquet as pq
import torch
from safetensors import safe_open

sys.path.insert(0, ".")
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts

torch.set_num_threads(1)
TRAIN = "--k 4 --precision float32 --learning-rate 1e-3 --epochs 2 --batch-size 4 --micro-batch-size 2"
ON = "--engine transformers --max-new-tokens 12 --max-prompt-tokens 60"


def cases():
    gen = {
        "rollouts-student": "",
        "rollouts-teacher": "--policy teacher",
        "rollouts-mixed": "--policy mixed --lambda 0.5",
        "rollouts-speculative": "--policy speculative --accept-k 5",
        "rollouts-teacher-mixed": "--policy teacher-mixed",
    }
    for n, o in gen.items():
        yield (
            n,
            f"generate --rollouts {{d}}/{n} --prompts {{d}}/prompts.jsonl {'' if n == 'rollouts-teacher' else '--student {d}/student'} {'--teacher {d}/teacher' if o else ''} {ON} --part-size 4 {o}",
        )
    for n, r, o in (
        ("scores", "rollouts-student", ""),
        ("scores8", "rollouts-student", "--signal hidden8"),
        ("scores-topk", "rollouts-student", "--signal topk --top-k 16"),
        ("scores-ranks", "rollouts-student", "--signal ranks"),
        ("scores-teacher", "rollouts-teacher", ""),
        ("scores-spec", "rollouts-speculative", ""),
        ("scores-mix", "rollouts-teacher-mixed", ""),
    ):
        yield (
            n,
            f"score --rollouts {{d}}/{r} --scores {{d}}/{n} --student {{d}}/student --teacher {{d}}/teacher --k 4 {o}",
        )
    off = {
        "tsdkd": "",
        "tsdkd-adaptive": "--opener adaptive",
        "tsdkd-sum": "--indirect-reduction sum --no-gate",
        "tsdkd-lora": "--lora --lora-rank 4",
        "tsdkd-lora-merge": "--lora --lora-rank 4 --merge",
        "tsdkd-compile": "--compile",
        "tsdkd-heldout": "--held-out 0.3 --eval-steps 2",
        "tsdkd-checkpointing": "--gradient-checkpointing",
        "tsdkd-bf16": "--precision bfloat16",
        "tsdkd-released": "--method tsdkd-released",
        "gkd": "--method gkd",
        "reverse-kl": "--method reverse-kl",
        "skew-kl": "--method skew-kl",
        "skew-reverse-kl": "--method skew-reverse-kl",
        "gkd-lora": "--method gkd --lora",
    }
    for n, o in off.items():
        k = "" if "--method gkd" in o or "kl" in o else "--k 4"
        yield (
            f"off-{n}",
            f"train --rollouts {{d}}/rollouts-student --scores {{d}}/scores --checkpoint {{d}}/off-{n} {TRAIN.replace('--k 4', k)} {o}",
        )
    for n, s, o in (
        ("topk", "scores-topk", "--k 4"),
        ("ranks", "scores-ranks", "--k 4 --direct-weight 0"),
        ("hidden8", "scores8", "--k 4"),
    ):
        yield (
            f"off-{n}",
            f"train --rollouts {{d}}/rollouts-student --scores {{d}}/{s} --checkpoint {{d}}/off-{n} {TRAIN.replace('--k 4', '')} {o}",
        )
    for n, r, s, o in (
        ("seqkd", "rollouts-teacher", None, "--method seqkd --student {d}/student"),
        ("supervised-kd", "rollouts-teacher", "scores-teacher", "--method supervised-kd"),
        ("skd", "rollouts-speculative", "scores-spec", "--method skd"),
        ("minillm", "rollouts-teacher-mixed", "scores-mix", "--method minillm"),
    ):
        yield (
            f"off-{n}",
            f"train --rollouts {{d}}/{r} {f'--scores {{d}}/{s}' if s else ''} --checkpoint {{d}}/off-{n} {TRAIN.replace('--k 4', '')} {o}",
        )
    on = {
        "tsdkd": "--k 4",
        "tsdkd-lora": "--k 4 --lora",
        "tsdkd-adaptive": "--k 4 --opener adaptive",
        "tsdkd-heldout": "--k 4 --held-out 0.3 --eval-steps 2",
        "gkd": "--method gkd",
        "minillm": "--method minillm",
        "reverse-kl": "--method reverse-kl",
        "skew-kl": "--method skew-kl",
        "tsdkd-released": "--method tsdkd-released --k 4",
    }
    for n, o in on.items():
        yield (
            f"on-{n}",
            f"train --prompts {{d}}/prompts.jsonl --student {{d}}/student --teacher {{d}}/teacher --checkpoint {{d}}/on-{n} {ON} {TRAIN.replace('--k 4', '')} {o}",
        )
    yield (
        "on-gkd-mixed",
        f"train --rollouts {{d}}/rollouts-teacher --student {{d}}/student --teacher {{d}}/teacher --lambda 0.5 --checkpoint {{d}}/on-gkd-mixed {ON.replace('--max-prompt-tokens 60', '')} {TRAIN.replace('--k 4', '')} --method gkd",
    )
    yield (
        "on-distillm",
        f"train --rollouts {{d}}/rollouts-teacher --student {{d}}/student --teacher {{d}}/teacher --checkpoint {{d}}/on-distillm {ON.replace('--max-prompt-tokens 60', '')} {TRAIN.replace('--k 4', '')} --method distillm --phi 0.5 --replay-capacity 4 --held-out 0.3 --eval-steps 2 --replay-tolerance 0",
    )
    two = {
        "off-two": f"train --rollouts {{d}}/rollouts-student --scores {{d}}/scores --checkpoint {{d}}/off-two {TRAIN}",
        "on-two": f"train --prompts {{d}}/prompts.jsonl --student {{d}}/student --teacher {{d}}/teacher --checkpoint {{d}}/on-two {ON} {TRAIN}",
        "scores-two": "score --rollouts {d}/rollouts-student --scores {d}/scores-two --student {d}/student --teacher {d}/teacher --k 4",
    }
    for n, c in two.items():
        yield n, "2 " + c
    yield (
        "pruned",
        "prune --teacher {d}/teacher --prompts {d}/prompts.jsonl --drop 2 --dtype float32 --output {d}/pruned",
    )


def digest(x):
    return hashlib.sha256(x).hexdigest()[:16]


def found(path):
    out = {}
    for f in sorted(path.glob("*.parquet")):
        t = pq.read_table(f)
        for c in t.column_names:
            if c in ("messages", "source"):
                continue
            out[f"{f.name} {c}"] = digest(json.dumps(t[c].to_pylist(), default=lambda b: b.hex()).encode())
    for f in sorted(path.glob("*.safetensors")):
        with safe_open(f, "pt") as s:
            for k in sorted(s.keys()):
                out[f"{f.name} {k}"] = digest(s.get_tensor(k).contiguous().view(torch.uint8).numpy().tobytes())
    m = path / "metrics.jsonl"
    if m.exists():
        out["metrics"] = [json.loads(l) for l in m.read_text().splitlines()]
    return out


if __name__ == "__main__":
    from tsdkd.cli import app

    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        save_tiny_model(d / "teacher", seed=1, layers=4, width=48, padding_rows=14)
        save_tiny_model(d / "student", seed=2)
        write_prompts(d / "prompts.jsonl", 11)
        result = {}
        for n, c in cases():
            args = c.format(d=d).split()
            if args[0] == "2":
                r = subprocess.run(
                    [
                        sys.executable,
                        "-m",
                        "torch.distributed.run",
                        "--standalone",
                        "--nproc-per-node=2",
                        "-m",
                        "--",
                        "tsdkd",
                        *args[1:],
                    ],
                    capture_output=True,
                    text=True,
                )
                assert r.returncode == 0, (n, r.stderr)
            else:
                try:
                    app(args, standalone_mode=False)
                except SystemExit as e:
                    assert not e.code, (n, e.code)
            result[n] = found(d / n)
            assert result[n], n
            print(n, len(result[n]), file=sys.stderr)
        target.write_text(json.dumps(result, indent=1))
