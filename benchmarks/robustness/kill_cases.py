"""The commands that kills.py kills: every stage, and every stage over an older output.

`{models}` in a command is the directory of two tiny models.
"""

from collections.abc import Iterator
from dataclasses import dataclass

STUDENT, TEACHER = "--student {models}/student", "--teacher {models}/teacher"
SAMPLING = "--prompts prompts.jsonl --engine transformers --max-new-tokens 6 --seed 3"
TRAINING = "--batch-size 4 --epochs 1 --save-steps 1 --precision float32 --k 4 --learning-rate 1e-3"
RUN = (
    f"generate --run run {STUDENT} {SAMPLING} --part-size 4",
    f"score --run run {STUDENT} {TEACHER} --k 4",
    f"train --run run {STUDENT} {TRAINING}",
    "eval --model m={models}/student --results run/results --data data --tasks embedded --limit 3",
)
"""The commands that make the run, which some stages read."""

_GENERATE = f"generate --rollouts out {SAMPLING} --part-size 4"
_SCORE = f"score --rollouts run/rollouts --scores out {STUDENT} {TEACHER} --batch-tokens 100 --k 4"
_TRAIN = f"train --rollouts run/rollouts --scores run/scores --checkpoint out {STUDENT} {TRAINING}"
_EVAL = "eval --model m={models}/student --results out --data data --tasks gsm8k,sciq --limit 3 --max-new-tokens 4"
_INSPECT = "inspect --run run --html out.html"


@dataclass(frozen=True, slots=True)
class Case:
    """A command that is killed."""

    name: str
    command: str
    output: str = "out"
    older: str = ""
    """The command that has made an older output; empty: there is none."""


_NEW = (
    Case("generate, student", f"{_GENERATE} {STUDENT}"),
    Case("generate, teacher", f"{_GENERATE} {TEACHER} --policy teacher"),
    Case("generate, speculative", f"{_GENERATE} {STUDENT} {TEACHER} --policy speculative"),
    Case("generate, teacher-mixed", f"{_GENERATE} {STUDENT} {TEACHER} --policy teacher-mixed"),
    Case("score, hidden", _SCORE),
    Case("score, topk", f"{_SCORE} --signal topk --top-k 8"),
    Case("score, ranks", f"{_SCORE} --signal ranks"),
    Case("train", _TRAIN),
    Case("train, held out", f"{_TRAIN} --held-out 0.3 --eval-steps 1"),
    Case("train, lora", f"{_TRAIN} --lora --lora-rank 2"),
    Case("train, lora merged", f"{_TRAIN} --lora --lora-rank 2 --merge"),
    Case("train, online", f"train --checkpoint out {STUDENT} {TEACHER} {SAMPLING} {TRAINING}"),
    Case("prune", f"prune --output out {TEACHER} --prompts prompts.jsonl --drop 1 --limit 2"),
    Case("eval", _EVAL, "out/m"),
    Case("inspect", f"{_INSPECT} --sample-id largest-gap", "out.html"),
    Case("report", "report run --html out.html", "out.html"),
)
_OTHER_SETTING = {
    "generate": "--seed 1",
    "score": "--k 3",
    "train": "--seed 1",
    "prune": "--drop 2",
    "eval": "--limit 2",
}
"""By command: options that change its output."""


def _over_older_outputs() -> Iterator[Case]:
    for case in _NEW:
        name = f"{case.name}, over an older one"
        setting = _OTHER_SETTING.get(case.command.split()[0])
        if setting:
            yield Case(name, f"{case.command} --overwrite", case.output, f"{case.command} {setting}")
        else:
            yield Case(name, case.command, case.output, f"{_INSPECT} --aggregate")
    yield Case("eval, one more benchmark", _EVAL, "out/m", f"{_EVAL} --tasks gsm8k")


CASES = {case.name: case for case in (*_NEW, *_over_older_outputs())}
