"""The commands of tsdkd with one spoiled input: an option, a file, a name, a plan or a line of a log."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tsdkd.artifacts.files import JOURNAL_FILE
from tsdkd.cli import app
from tsdkd.stages.config.option import config_options
from tsdkd.stages.config.recorded import CONFIGS

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

WORDS = (
    *("", " ", "-1", "0", "1", "-0.0", "nan", "inf", "-inf", "1e-320", "1e300", "1e40", "-1e9", "18446744073709551616"),
    *("9" * 400, "0x10", "1_000", "½", "٣", "abc", "None", "true", "cuda:7", "mps", "foo", "cuda", "cpu:9", "meta"),
    *("a,b", ",", "a/b", "/dev/zero", "/dev/null", "/proc/self/mem", "..", "~nobody", "x" * 300, "é\x1b[2J\u202e"),
    *("all-linear", "lm_head", "auto", "fp8", "float16", "adaptive", "teacher", "mixed", "[red]", "%s{}"),
)
"""Values of options, and paths."""
VALUES = (
    *(None, True, False, 0, -1, 1, 2**31, 2**64, 1.5, -0.5, 1e300, float("nan"), float("inf")),
    *("", "abc", "1", "\ud800"),
    *([], [1], [[1]], ["a"], [-1], [10**6], {}, {"a": 1}, {"rope_type": "none"}, "../x", "x" * 9999),
)
"""Values of JSON, in a model's config and in an adapter's."""
TEMPLATES = (
    *("", "{{", "{% for %}", "{{ x.y.z }}", "{{ raise_exception('no') }}", "{{ messages }}", "{% include 'x' %}"),
    *("{{ 1 / 0 }}", "{{ 'a' * 10 ** 12 }}", "{{ range(10 ** 9) }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    *("{{ messages[9].content }}", "{{ strftime_now('%Y') }}", "{{ '<|end|>' * 5000 }}"),
    "<|tool|>{{ messages[0].role }}",
)
"""Chat templates."""
LINES = (
    *(b"", b"\n\n", b"\xff\xfe", b"\0\0", b"{", b"[]", b"null", b"3", b'"a"', b"{}", b'{"prompt": null}'),
    *(b'{"prompt": 3}', b'{"prompt": ""}', b'{"messages": []}', b'{"messages": {}}'),
    b'{"messages": [{"role": 1, "content": "a"}]}',
    *(b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', b'{"prompt": "a", "tools": "x"}'),
    *(b'{"prompt": "\\ud800"}', b'{"prompt": "a", "prompt_id": []}', b"[" * 99999),
    *(b'{"prompt": "' + b"a" * 99999 + b'"}', b'{"messages": [{"role": "tool", "content": "a"}]}'),
    *(b'{"prompt": "a", "source": {"b": NaN}}', b'{"prompt": NaN}'),
)
"""Lines of prompts, journals and logs."""
PLANS = (
    *("tsdkd", "tsdkd train --lora --lora-rank 99999999", "tsdkd prune --teacher {d}/teacher --drop 9 --output {d}/x"),
    *("tsdkd prune --teacher {d}/teacher --drop 4 --output x", "tsdkd generate --limit 1e9", "ls", "A=B", "'", "\0"),
    *("tsdkd eval --compare", "tsdkd plan -", "tsdkd generate --student {d}/nobody", "tsdkd generate --prompts a/b"),
    *("X=1 tsdkd generate --student {d}/student --prompts {d}/p.jsonl --max-new-tokens 2147483647", "=1 tsdkd report"),
)
"""Lines of a plan."""
OPTIONS = (
    *(b"k: [1]", b"k: {a: 1}", b"\xff", b"k: 1\nk: 2", b"- 1", b"k: !!python/object:os.system x", b"&a [*a]"),
    b"k: .nan",
    *(b"limit: 1:30", b"temperature: " + b"9" * 400, b"seed: 99999999999", b"a: &b [*b]", b"? [1]\n: 2", b"\0"),
    b"overwrite: true",
    *(b"1: 2", b"null: 1", b"max-new-tokens: 1e3", b"k: 010", b"[" * 5000, b"{" * 5000, b"batch-size: true"),
)
"""Files for --config."""


@dataclass
class Spoiler:
    """Spoils one input of one command; both are drawn by the generator."""

    generator: random.Random
    directory: Path
    """A copy of the inputs, in which files are spoiled."""

    def spoiled_command(self) -> tuple[str, list[str]]:
        """The command's name, and its words."""
        name = self.generator.choice([*COMMANDS])
        words = [word.format(d=self.directory) for word in COMMANDS[name].split()]
        spoilers: list[Callable[[list[str]], list[str]]] = [self.spoil_option] * 3 + [self.spoil_model] * 3
        spoilers += [self.spoil_prompts, self.spoil_name, self.spoil_config, self.spoil_adapter]
        if name in {"plan", "report", "show"}:
            spoilers = [self.spoil_name, {"plan": self.spoil_plan}.get(name, self.spoil_log)]
        return name, self.generator.choice(spoilers)(words)

    def spoil_option(self, words: list[str]) -> list[str]:
        options = config_options(CONFIGS[words[0]]) if words[0] in CONFIGS else ()
        names = [f"--{option.name}" for option in options] + ["--seed", "--limit", "--student", "--teacher", "--run"]
        name = self.generator.choice(names)
        flag = any(f"--{option.name}" == name and option.type is bool for option in options)
        return [*words, name, *([] if flag else [self.generator.choice(WORDS)])]

    def spoil_name(self, words: list[str]) -> list[str]:
        paths = [i for i, word in enumerate(words) if str(self.directory) in word]
        words[self.generator.choice(paths)] = self.generator.choice([*WORDS, str(self.directory), "org/model", "a\0b"])
        return words

    def spoil_prompts(self, words: list[str]) -> list[str]:
        lines = [*self.generator.choices(LINES, k=2), b'{"prompt": "What?"}']
        self.generator.shuffle(lines)
        suffix = self.generator.choice([".jsonl", ".json", ".csv", ".parquet", ".JSONL"])
        (self.directory / f"bad{suffix}").write_bytes(b"\n".join(lines))
        return [word.replace("p.jsonl", f"bad{suffix}") for word in words]

    def spoil_config(self, words: list[str]) -> list[str]:
        (self.directory / "options.yaml").write_bytes(self.generator.choice(OPTIONS))
        return [*words, "--config", str(self.directory / "options.yaml")]

    def spoil_plan(self, words: list[str]) -> list[str]:
        lines = [line.format(d=self.directory) for line in self.generator.choices(PLANS, k=2)]
        content = "\n".join(lines).encode() + self.generator.choice([b"", b"\xff", b"\n"])
        (self.directory / "chain").write_bytes(content)
        return words

    def spoil_log(self, words: list[str]) -> list[str]:
        run = self.directory / "run"
        file = self.generator.choice([run / "rollouts" / JOURNAL_FILE, run / "checkpoint" / "metrics.jsonl"])
        file.write_bytes(b"\n".join(self.generator.choices(LINES, k=3)) + b"\n")
        return words

    def spoil_adapter(self, words: list[str]) -> list[str]:
        settings = {"peft_type": "LORA", "base_model_name_or_path": "../student", "r": 2, "target_modules": ["q_proj"]}
        others = ("lora_alpha", "megatron_config", "rank_pattern", "modules_to_save", "revision")
        key = self.generator.choice([*settings, *others])
        settings[key] = self.generator.choice([*VALUES, ".", "../adapter", "../nobody"])
        adapter = self.directory / "adapter"
        shutil.copytree(self.directory / "student", adapter)
        (adapter / "model.safetensors").unlink()
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        return [word.replace("/student", "/adapter") for word in words]

    def spoil_model(self, words: list[str]) -> list[str]:
        model = self.directory / self.generator.choice(["student", "teacher"])
        names = [*(path.name for path in model.iterdir()), "config.json", "chat_template.jinja"]
        file = model / self.generator.choice(names)
        content = file.read_bytes()
        damage = self.generator.randrange(6)
        if file.name.endswith("jinja"):
            file.write_text(self.generator.choice(TEMPLATES))
        elif damage == 0:
            file.write_bytes(content[: self.generator.randrange(len(content))])
        elif damage == 1:
            position = self.generator.randrange(len(content))
            file.write_bytes(content[:position] + b"\xff\0{" + content[position + 3 :])
        elif file.suffix == ".json":
            values = json.loads(content)
            others = ("eos_token_id", "vocab_size", "auto_map", "num_hidden_layers", "rope_parameters", "model_type")
            values[self.generator.choice([*values, *others])] = self.generator.choice(VALUES)
            file.write_text(json.dumps(values))
        else:
            file.unlink()
        return words


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
