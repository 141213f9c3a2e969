"""Counts what commands do with bad inputs: refuse them with a cause and a remedy, run, or end in a raw error.

    python -m benchmarks.robustness.bad_inputs --trials 1000 --seed 0

Each trial spoils one input of one command: an option, a prompts file, a file of a model or an adapter, a name, a plan,
a file of options, a journal or a log. It runs in a forked process with a time limit. Prints a table of counts by
command, and every raw error with the number of its trial; `--only N` repeats one.
"""

import argparse
import json
import os
import random
import re
import select
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import huggingface_hub
from typer.testing import CliRunner

from benchmarks.robustness.rows import Row, add_common_options, write_rows_and_exit
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tsdkd.artifacts.files import JOURNAL_FILE
from tsdkd.cli import app
from tsdkd.stages.config.option import config_options
from tsdkd.stages.config.recorded import CONFIGS
from tsdkd.stages.engines import choice

SECONDS = 120
"""Time limit of one trial; a slower one counts as a raw error."""
RAW = re.compile(r"^\w*(Error|Exception|Interrupt|Exit|Warning)\b:|Traceback|run `?tsdkd --debug", re.IGNORECASE)
"""A cause that names a Python error."""
WORDS = (
    *("", " ", "-1", "0", "1", "-0.0", "nan", "inf", "-inf", "1e-320", "1e300", "1e40", "-1e9", "18446744073709551616"),
    *("9" * 400, "0x10", "1_000", "½", "٣", "abc", "None", "true", "cuda:7", "mps", "foo", "cuda", "cpu:9", "meta"),
    *("a,b", ",", "a/b", "/dev/zero", "/dev/null", "/proc/self/mem", "..", "~nobody", "x" * 300, "é\x1b[2J\u202e"),
    *("all-linear", "lm_head", "auto", "fp8", "float16", "adaptive", "teacher", "mixed", "[red]", "%s{}"),
)
VALUES = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**64,
        1.5,
        -0.5,
        1e300,
        float("nan"),
        float("inf"),
        "",
        "abc",
        "1",
        "\ud800",
    ),
    *([], [1], [[1]], ["a"], [-1], [10**6], {}, {"a": 1}, {"rope_type": "none"}, "../x", "x" * 9999),
)
TEMPLATES = (
    *("", "{{", "{% for %}", "{{ x.y.z }}", "{{ raise_exception('no') }}", "{{ messages }}", "{% include 'x' %}"),
    *("{{ 1 / 0 }}", "{{ 'a' * 10 ** 12 }}", "{{ range(10 ** 9) }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    *(
        "{{ messages[9].content }}",
        "{{ strftime_now('%Y') }}",
        "{{ '<|end|>' * 5000 }}",
        "<|tool|>{{ messages[0].role }}",
    ),
)
LINES = (
    *(
        b"",
        b"\n\n",
        b"\xff\xfe",
        b"\0\0",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"a"',
        b"{}",
        b'{"prompt": null}',
        b'{"prompt": 3}',
    ),
    *(b'{"prompt": ""}', b'{"messages": []}', b'{"messages": {}}', b'{"messages": [{"role": 1, "content": "a"}]}'),
    *(b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', b'{"prompt": "a", "tools": "x"}'),
    *(
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "prompt_id": []}',
        b"[" * 99999,
        b'{"prompt": "' + b"a" * 99999 + b'"}',
    ),
    *(
        b'{"messages": [{"role": "tool", "content": "a"}]}',
        b'{"prompt": "a", "source": {"b": NaN}}',
        b'{"prompt": NaN}',
    ),
)
PLANS = (
    *("tsdkd", "tsdkd train --lora --lora-rank 99999999", "tsdkd prune --teacher {d}/teacher --drop 9 --output {d}/x"),
    *("tsdkd prune --teacher {d}/teacher --drop 4 --output x", "tsdkd generate --limit 1e9", "ls", "A=B", "'", "\0"),
    *("tsdkd eval --compare", "tsdkd plan -", "tsdkd generate --student {d}/nobody", "tsdkd generate --prompts a/b"),
    *("X=1 tsdkd generate --student {d}/student --prompts {d}/p.jsonl --max-new-tokens 2147483647", "=1 tsdkd report"),
)
OPTIONS = (
    *(
        b"k: [1]",
        b"k: {a: 1}",
        b"\xff",
        b"k: 1\nk: 2",
        b"- 1",
        b"k: !!python/object:os.system x",
        b"&a [*a]",
        b"k: .nan",
    ),
    *(
        b"limit: 1:30",
        b"temperature: " + b"9" * 400,
        b"seed: 99999999999",
        b"a: &b [*b]",
        b"? [1]\n: 2",
        b"\0",
        b"overwrite: true",
    ),
    *(b"1: 2", b"null: 1", b"max-new-tokens: 1e3", b"k: 010", b"[" * 5000, b"{" * 5000, b"batch-size: true"),
)


@dataclass
class Trial:
    """A command with one spoiled input, in a directory of its own."""

    random: random.Random
    directory: Path

    def choose(self) -> tuple[str, list[str]]:
        """The command's name, and its words."""
        name = self.random.choice([*COMMANDS])
        words = [word.format(d=self.directory) for word in COMMANDS[name].split()]
        spoilers: list[Callable[[list[str]], list[str]]] = [self.spoil_option] * 3 + [self.spoil_model] * 3
        spoilers += [self.spoil_prompts, self.spoil_name, self.spoil_config, self.spoil_adapter]
        if name in {"plan", "report", "show"}:
            spoilers = [self.spoil_name, {"plan": self.spoil_plan}.get(name, self.spoil_log)]
        return name, self.random.choice(spoilers)(words)

    def spoil_option(self, words: list[str]) -> list[str]:
        options = config_options(CONFIGS[words[0]]) if words[0] in CONFIGS else ()
        names = [f"--{option.name}" for option in options] + ["--seed", "--limit", "--student", "--teacher", "--run"]
        name = self.random.choice(names)
        flag = any(f"--{option.name}" == name and option.type is bool for option in options)
        return [*words, name, *([] if flag else [self.random.choice(WORDS)])]

    def spoil_name(self, words: list[str]) -> list[str]:
        paths = [i for i, word in enumerate(words) if str(self.directory) in word]
        words[self.random.choice(paths)] = self.random.choice([*WORDS, str(self.directory), "org/model", "a\0b"])
        return words

    def spoil_prompts(self, words: list[str]) -> list[str]:
        lines = [*self.random.choices(LINES, k=2), b'{"prompt": "What?"}']
        self.random.shuffle(lines)
        suffix = self.random.choice([".jsonl", ".json", ".csv", ".parquet", ".JSONL"])
        (self.directory / f"bad{suffix}").write_bytes(b"\n".join(lines))
        return [word.replace("p.jsonl", f"bad{suffix}") for word in words]

    def spoil_config(self, words: list[str]) -> list[str]:
        (self.directory / "options.yaml").write_bytes(self.random.choice(OPTIONS))
        return [*words, "--config", str(self.directory / "options.yaml")]

    def spoil_plan(self, words: list[str]) -> list[str]:
        lines = [line.format(d=self.directory) for line in self.random.choices(PLANS, k=2)]
        content = "\n".join(lines).encode() + self.random.choice([b"", b"\xff", b"\n"])
        (self.directory / "chain").write_bytes(content)
        return words

    def spoil_log(self, words: list[str]) -> list[str]:
        run = self.directory / "run"
        file = self.random.choice([run / "rollouts" / JOURNAL_FILE, run / "checkpoint" / "metrics.jsonl"])
        file.write_bytes(b"\n".join(self.random.choices(LINES, k=3)) + b"\n")
        return words

    def spoil_adapter(self, words: list[str]) -> list[str]:
        settings = {"peft_type": "LORA", "base_model_name_or_path": "../student", "r": 2, "target_modules": ["q_proj"]}
        key = self.random.choice(
            [*settings, "lora_alpha", "megatron_config", "rank_pattern", "modules_to_save", "revision"]
        )
        settings[key] = self.random.choice([*VALUES, ".", "../adapter", "../nobody"])
        adapter = self.directory / "adapter"
        shutil.copytree(self.directory / "student", adapter)
        (adapter / "model.safetensors").unlink()
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        return [word.replace("/student", "/adapter") for word in words]

    def spoil_model(self, words: list[str]) -> list[str]:
        model = self.directory / self.random.choice(["student", "teacher"])
        file = model / self.random.choice(
            [*(path.name for path in model.iterdir()), "config.json", "chat_template.jinja"]
        )
        content = file.read_bytes()
        damage = self.random.randrange(6)
        if file.name.endswith("jinja"):
            file.write_text(self.random.choice(TEMPLATES))
        elif damage == 0:
            file.write_bytes(content[: self.random.randrange(len(content))])
        elif damage == 1:
            position = self.random.randrange(len(content))
            file.write_bytes(content[:position] + b"\xff\0{" + content[position + 3 :])
        elif file.suffix == ".json":
            values = json.loads(content)
            keys = [
                *values,
                "eos_token_id",
                "vocab_size",
                "auto_map",
                "num_hidden_layers",
                "rope_parameters",
                "model_type",
            ]
            values[self.random.choice(keys)] = self.random.choice(VALUES)
            file.write_text(json.dumps(values))
        else:
            file.unlink()
        return words


MODELS = "--student {d}/student --teacher {d}/teacher"
TRAINING = "--checkpoint {d}/new --k 4 --batch-size 2 --epochs 1"
COMMANDS = {
    "generate": "generate --student {d}/student --prompts {d}/p.jsonl --run {d}/new --max-new-tokens 4",
    "generate by both": f"generate {MODELS} --policy speculative --prompts {{d}}/p.jsonl --run {{d}}/new "
    "--max-new-tokens 4",
    "score": f"score {MODELS} --rollouts {{d}}/run/rollouts --scores {{d}}/new --k 4",
    "train": f"train --student {{d}}/student --run {{d}}/run {TRAINING}",
    "train --lora": f"train --lora --student {{d}}/student --run {{d}}/run {TRAINING}",
    "train online": f"train {MODELS} --prompts {{d}}/p.jsonl {TRAINING} --max-new-tokens 4",
    "eval": "eval --model m={d}/student --tasks embedded --limit 2 --results {d}/new --max-new-tokens 4",
    "prune": "prune --teacher {d}/teacher --prompts {d}/p.jsonl --output {d}/new",
    "inspect": "inspect --run {d}/run --after {d}/student",
    "plan": "plan {d}/chain",
    "report": "report {d}/run",
    "show": "artifact show {d}/run/rollouts",
}


def make_inputs(directory: Path) -> None:
    """Two tiny models, prompts, a plan and a run."""
    save_tiny_model(directory / "student", seed=2)
    save_tiny_model(directory / "teacher", seed=1, layers=4)
    write_prompts(directory / "p.jsonl", 4)
    inputs = f"--student {directory}/student --prompts {directory}/p.jsonl"
    (directory / "chain").write_text(f"tsdkd generate {inputs}\n")
    for command in (
        f"generate {inputs} --max-new-tokens 4 --engine transformers",
        f"score --teacher {directory}/teacher --k 4",
        "train --k 4 --batch-size 2 --epochs 1",
    ):
        result = CliRunner().invoke(app, [*command.split(), "--run", str(directory / "run")])
        assert result.exit_code == 0, result.output


def run_trial(inputs: Path, seed: int, trial: int) -> tuple[str, str, str]:
    """The command, its outcome ("refused", "ran" or "raw") and what it printed."""
    with TemporaryDirectory() as directory:
        copy = Path(directory) / "above" / "d"
        shutil.copytree(inputs, copy)
        # The run names the inputs' models by their paths, which the copy does not change.
        name, words = Trial(random.Random(seed * 1_000_003 + trial), copy).choose()
        code, output = _in_child(words, copy)
    return name, outcome_of(code, output), f"{words} -> {code}\n{output[-1500:]}"


def outcome_of(code: int | None, output: str) -> str:
    if code == 0:
        return "ran"
    lines = [line for line in output.splitlines() if line.startswith(("error:", "try:"))]
    has_cause_and_remedy = [line.split(":")[0] for line in lines] == ["error", "try"]
    return "refused" if code in {1, 2} and has_cause_and_remedy and not any(map(RAW.search, _texts(lines))) else "raw"


def _texts(lines: list[str]) -> Iterator[str]:
    return (line.partition(":")[2].strip() for line in lines)


def _in_child(words: list[str], directory: Path) -> tuple[int | None, str]:
    """The exit code (None: after the time limit or a signal) and the output of a command in a forked process.

    It runs in `directory`, because a word may become a relative output path.
    """
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.close(reader)
        os.chdir(directory)
        choice.has_vllm = lambda: False  # it takes half a minute to load
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        try:
            result = CliRunner().invoke(app, words, input="y\n" * 9)
            crash = "" if isinstance(result.exception, SystemExit | None) else f"Traceback {result.exception!r}"
            answer = json.dumps([result.exit_code, result.stderr + crash])
        except BaseException:
            answer = json.dumps([99, traceback.format_exc()])
        with os.fdopen(writer, "w") as file:
            file.write(answer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        ready, _, _ = select.select([file], [], [], SECONDS)
        content = file.read() if ready else ""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    code, output = json.loads(content) if content else (None, "no answer")
    return code, output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, trials=1000)
    parser.add_argument("--only", type=int, help="number of the one trial to repeat")
    options = parser.parse_args()
    counts: dict[str, Counter[str]] = {name: Counter() for name in COMMANDS}
    with TemporaryDirectory() as directory:
        inputs = Path(directory)
        make_inputs(inputs)
        for trial in range(options.trials) if options.only is None else [options.only]:
            name, outcome, report = run_trial(inputs, options.seed, trial)
            counts[name][outcome] += 1
            if outcome == "raw" or options.only is not None:
                print(f"trial {trial}: {report}\n", file=sys.stderr, flush=True)
    rows = [
        Row(name, found.total(), found["raw"], {name: found[name] for name in ("refused", "ran", "raw")})
        for name, found in counts.items()
    ]
    write_rows_and_exit("Bad inputs", rows, options.json)


if __name__ == "__main__":
    main()
