"""--config FILE: options that it gives or refuses; and config.yaml, which makes an artifact again."""

import json
import shlex
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.helpers.commands import refuse, run
from tests.helpers.prompts import write_prompts
from tsdkd.artifacts.files import CONFIG_FILE
from tsdkd.artifacts.hashing import content_digest
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.reader import verify_artifact
from tsdkd.cli import app
from tsdkd.cli.eval import read_eval_config
from tsdkd.cli.options import read_config
from tsdkd.cli.reference import load_command
from tsdkd.cli.train_config import read_train_config
from tsdkd.core.config import RELEASED
from tsdkd.errors import InputError
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.inspect import InspectConfig
from tsdkd.stages.config.option import ConfigOption, build, config_options
from tsdkd.stages.config.prune import PruneConfig
from tsdkd.stages.config.recorded import CONFIGS, config_values, options_text
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import ONLINE_SAMPLING, LoRAConfig, OnlineConfig, ReplayConfig, TrainConfig
from tsdkd.stages.methods import METHODS, Method, find_method
from tsdkd.stages.methods.values import option_text
from tsdkd.stages.results.benchmarks import BENCHMARKS


def context(command: str, file: Path, content: str | dict[str, Any], *words: object) -> Any:
    """A command, parsed with a file."""
    file.write_text(content if isinstance(content, str) else options_text(content), encoding="utf-8")
    return load_command(command).make_context(command, ["--config", str(file), *map(str, words)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "options.yaml"


def test_a_file_gives_options_and_the_command_line_wins(file: Path) -> None:
    content = (
        "run: runs/x\nlearning_rate: 5e-6\nbatch-size: 64\nlora: true\nlora-rank: 4\nopener: adaptive\ngate: false\n"
    )
    parsed = context("train", file, content, "--batch-size", 32)
    config = read_train_config(parsed)
    assert (config.learning_rate, config.batch_size) == (5e-6, 32)
    assert config.lora == LoRAConfig(rank=4)
    assert (config.objective.opener, config.objective.gate) == ("adaptive", False)
    assert parsed.params["run"] == Path("runs/x")


@pytest.mark.parametrize("switch", ["lora", "compile", "gradient-checkpointing", "stop-on-degeneration"])
def test_the_command_line_switches_off_what_a_file_switches_on(file: Path, switch: str) -> None:
    content = {switch: True, "held-out": 0.1, "eval-steps": 5}
    on = read_train_config(context("train", file, content))
    off = read_train_config(context("train", file, content, f"--no-{switch}"))
    name = switch.replace("-", "_")
    assert getattr(on, name)
    assert off == replace(on, **{name: None if switch == "lora" else False})


def test_words_that_look_like_numbers_need_quotes(file: Path) -> None:
    assert read_config(context("generate", file, "system: '1.10'"), GenerateConfig).system == "1.10"
    assert read_train_config(context("train", file, "opener: 0.25\nlearning-rate: 1.5e-5")).objective.opener == 0.25


def test_lists_stand_for_repeated_and_for_joined_options(file: Path) -> None:
    content = {"tracker": ["trackio", "wandb"], "released": ["entropy", "ranking"], "epochs": 2, "column": None}
    config = read_train_config(context("train", file, content))
    assert (config.trackers, config.objective.released, config.epochs) == (
        ("trackio", "wandb"),
        ("ranking", "entropy"),
        2.0,
    )
    assert read_eval_config(context("eval", file, {"tasks": ["gsm8k", "sciq"]})).tasks == ("gsm8k", "sciq")
    assert context("eval", file, {"model": "a=b"}).params["model"] == ["a=b"]


def test_a_required_option_may_stand_in_a_file(file: Path) -> None:
    assert context("prune", file, {"output": "small", "drop": 2}).params["output"] == Path("small")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ({"method": "gkd", "opener": 0.1}, "gkd has no --opener"),
        ({"max-new-tokens": 9}, "online training are given without it"),
        ({"lora-rank": 16}, "LoRA are given without --lora"),
        ({"replay-capacity": 1000}, "replays no responses"),
    ],
)
def test_a_value_of_a_file_is_given(file: Path, content: dict[str, object], cause: str) -> None:
    """Even where it is the default."""
    with pytest.raises(InputError, match=cause):
        read_train_config(context("train", file, content))


@pytest.mark.parametrize(
    ("command", "content", "cause", "remedy"),
    [
        ("train", "lerning-rate: 1", "`tsdkd train` has no option 'lerning-rate'", "'learning-rate'"),
        ("generate", "learning-rate: 1", "`tsdkd generate` has no option 'learning-rate'", "nearest"),
        ("train", "config: other.yaml", "no option 'config'", "nearest"),
        ("train", "batch-size: 4.5", "batch-size is 4.5", "a whole number from 1"),
        ("train", "batch-size: 0", "batch-size is 0", "a whole number from 1"),
        ("train", "batch-size: true", "batch-size is True", "a whole number from 1"),
        ("train", "beta: 2", "beta is 2", "a number from 0 to 1"),
        ("train", "beta: many", "beta is 'many'", "a number from 0 to 1"),
        ("train", "gate: maybe", "gate is 'maybe'", "true or false"),
        ("train", "precision: half", "precision is 'half'", "one of auto, bfloat16, float32"),
        ("train", "student: [a, b]", "student is ['a', 'b']", "a word"),
        ("train", "student: true", "student is True", "a word"),
        ("train", "tracker: [1]", "tracker is [1]", "a list of words"),
        ("train", "tau: 0", "tau is 0", "above 0"),
        ("train", "epochs: .inf", "epochs is '.inf'", "a number"),
        ("train", "epochs: 1e400", "epochs is inf", "a number"),
        ("train", "batch-size: 010", "batch-size is '010'", "a whole number from 1"),
        ("train", "seed: 1:30", "seed is '1:30'", "a whole number from 0"),
        ("train", "k: 4\nk: 5", "gives k twice", "Give it once"),
        ("train", "eval-steps: 4\neval_steps: 5", "gives eval-steps twice", "Give it once"),
        ("generate", "system: 1.10", "system is 1.1", "put a number in quotes"),
        ("train", "opener: true", "opener is True", "a number, or a word"),
        ("train", "overwrite: true", "replaces an artifact, so no file may give it", "--overwrite on the command line"),
        ("eval", "allow-code-execution: true", "runs programs that a model wrote", "on the command line"),
        ("eval", "tasks: []", "--tasks names no benchmark", "Name some"),
        ("train", "- a", "holds no options", "`k: 10`"),
        ("train", "a: [", "is not YAML", "`k: 10`"),
        ("score", "k: 1", "k is 1", "from 2"),
        ("inspect", "opener: long", "--opener is 'long'", "adaptive"),
        ("eval", "tasks: poetry", "'poetry' is not a benchmark", "gsm8k"),
    ],
)
def test_wrong_keys_and_values_are_refused_by_key(
    file: Path, command: str, content: str, cause: str, remedy: str
) -> None:
    file.write_text(content)
    message, found_remedy = refuse(command, "--config", file)
    assert cause in message
    assert remedy in found_remedy


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refuse("train", "--config", tmp_path / "none.yaml")[0]


def test_an_empty_file_gives_nothing(file: Path) -> None:
    assert read_train_config(context("train", file, "")) == TrainConfig()


def test_a_plan_reads_files(file: Path) -> None:
    file.write_text("k: 1")
    result = CliRunner().invoke(app, ["plan", "-"], input=f"tsdkd score --config {file}\n")
    assert result.exit_code == 2
    assert "Line 1:" in result.stderr
    assert "k is 1" in result.stderr


# Random configurations, through a file and back.

BOUNDS = {
    "skew": (0.01, 0.99),
    "tau": (0.01, 9.0),
    "temperature": (0.01, 9.0),
    "em-ratio": (0.01, 1.0),
    "epochs": (0.1, 9.0),
    "warmup-ratio": (0.0, 0.9),
    "max-grad-norm": (0.1, 9.0),
    "lora-dropout": (0.0, 0.9),
    "held-out": (0.01, 0.9),
    "lambda": (0.1, 1.0),
}
"""Of numbers, where the option's own range is not enough."""
WHOLE = {"max-new-tokens": (10_001, 20_000)}  # above --rollout-tokens
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=9)
LISTED = {"tasks": sorted(BENCHMARKS), "released": list(RELEASED)}


def values_of(option: ConfigOption) -> st.SearchStrategy[Any]:
    if option.name in LISTED:
        order = LISTED[option.name]
        return st.sets(st.sampled_from(order), min_size=1).map(lambda s: tuple(sorted(s, key=order.index)))
    if option.is_tuple:
        return st.lists(WORDS, max_size=3).map(tuple)
    if option.name == "chat-template-kwargs":
        return st.none() | st.dictionaries(st.sampled_from("abc"), st.booleans(), min_size=1).map(json.dumps)
    if option.choices:
        return st.sampled_from(option.choices)
    members = getattr(option.type, "__args__", (option.type,))
    low, high = BOUNDS.get(option.name, (option.option.min or 0, option.option.max or 99))
    known: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(*WHOLE.get(option.name, (int(option.option.min or 0), 10_000))),
        float: st.floats(low, high).map(lambda number: round(number, 3)),
        str: WORDS,
        type(None): st.none(),
    }
    if option.is_number_or_word:
        numbers = st.floats(0.01, 1) | st.just("adaptive")
        return numbers | st.none() if type(None) in members else numbers
    return st.one_of(*(known[member] for member in members))


def configs(kind: type) -> st.SearchStrategy[Any]:
    values = st.fixed_dictionaries({option.key: values_of(option) for option in config_options(kind)})
    if kind is CONFIGS["eval"]:
        values = values.filter(
            lambda v: v["chat_template"] is not False or not (v["chat.template"] or v["chat.kwargs"])
        )
    return values.map(lambda given: build(kind, given))


ROUND_TRIP = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("command", ["generate", "score", "prune", "inspect"])
def test_any_configuration_survives_a_file(command: str, file: Path) -> None:
    kind = {"generate": GenerateConfig, "score": ScoreConfig, "prune": PruneConfig, "inspect": InspectConfig}[command]
    words = ["--output", "x"] if command == "prune" else []

    @ROUND_TRIP
    @given(configs(kind))
    def check(config: Any) -> None:
        if command == "inspect":
            content = {option.name: attrgetter(option.key)(config) for option in config_options(kind)}
        else:
            content = config_values(command, asdict(config))
        assert read_config(context(command, file, content, *words), kind) == config

    check()


def test_any_configuration_of_eval_survives_a_file(file: Path) -> None:
    @ROUND_TRIP
    @given(configs(CONFIGS["eval"]))
    def check(config: Any) -> None:
        read = read_eval_config(context("eval", file, plain(config_values("eval", asdict(config)))))
        assert set(read.tasks) == set(config.tasks)
        assert replace(read, tasks=config.tasks) == config

    check()


def test_any_configuration_of_train_survives_a_file(file: Path) -> None:
    @ROUND_TRIP
    @given(train_configs())
    def check(config: TrainConfig) -> None:
        content = plain(config_values("train", asdict(config)))
        assert read_train_config(context("train", file, content)) == config

    check()


def plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@st.composite
def train_configs(draw: st.DrawFn) -> TrainConfig:
    strategies = {option.key: values_of(option) for option in config_options(TrainConfig)}

    def some(prefix: str) -> dict[str, Any]:
        keys = [key for key in strategies if key.startswith(prefix) and "." not in key.removeprefix(prefix)]
        return {key.removeprefix(prefix): draw(strategies[key]) for key in keys}

    method = find_method(draw(st.sampled_from(sorted(METHODS))))
    own = {name: value for name, value in some("").items() if name not in {"method", "lora"}}
    own["method_options"] = tuple(option_text(*item) for item in method.options.items() if draw(st.booleans()))
    own[draw(st.sampled_from(["micro_batch_size", "micro_batch_tokens"]))] = None
    if draw(st.booleans()) and not method.uses_replay:
        own |= {"held_out": 0.0, "eval_steps": 0}
    else:
        own["eval_steps"] = max(1, own["eval_steps"])
    online = None
    if method.uses_replay or draw(st.booleans()):
        sampling = {name: draw(strategies[f"online.sampling.{name}"]) for name in ONLINE_SAMPLING}
        mixed = bool(sampling["teacher_fraction"]) and not method.uses_replay
        sampling |= {"policy": "teacher-mixed"} if mixed else {"teacher_fraction": 0.2}
        values = some("online.")
        values["rollout_ahead"] = 0 if method.uses_replay else draw(st.integers(0, 1))
        values[draw(st.sampled_from(["rollout_url", "rollout_gpus"]))] = None
        if method.uses_replay:
            replay = some("online.replay.")
            replay["replay_capacity"] += own["batch_size"]
            values |= {"student_fraction": 0.0, "replay": ReplayConfig(**replay)}
        online = OnlineConfig(**values, sampling=GenerateConfig(**sampling))
    lora = LoRAConfig(**some("lora.")) if draw(st.booleans()) else None
    chat = ChatConfig(**some("chat."))
    objective = draw(objectives(method))
    return TrainConfig(method=method.name, objective=objective, online=online, lora=lora, chat=chat, **own)


@st.composite
def objectives(draw: st.DrawFn, method: Method) -> Any:
    strategies = {option.key: values_of(option) for option in config_options(TrainConfig)}
    chosen = draw(st.sets(st.sampled_from(method.objective_options))) if method.objective_options else set()
    values = {name: draw(strategies[f"objective.{name}"]) for name in chosen}
    divergence = values.get("divergence", method.objective.divergence)
    values.pop("skew" if divergence == "jsd" else "beta", None)
    if values.get("opener") == "adaptive" and "opener" in values.get("released", method.objective.released):
        del values["opener"]
    if not any(values.get(name, getattr(method.objective, name)) for name in ("alpha", "direct_weight", "em_weight")):
        values = {}
    return method.with_options(values)


# config.yaml of one run makes the next one.


@pytest.fixture(scope="module")
def first(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with several trainings."""
    directory = tmp_path_factory.mktemp("configs") / "first"
    prompts = write_prompts(directory.parent / "prompts.jsonl", 6)
    models, shape = f"--student {student} --teacher {teacher}", "--epochs 1 --batch-size 3 --precision float32"
    online = f"{models} --prompts {prompts} --max-new-tokens 4 --max-prompt-tokens 60 --engine transformers"
    for line in (
        f"generate {models} --policy mixed --lambda 0.7 --prompts {prompts} --max-new-tokens 5 --top-p 0.9 --seed 3",
        "score --k 4 --signal topk --top-k 9",
        f"train --k 4 {shape} --opener adaptive --no-gate --em-weight 0.5 --seed 2",
        f"train --k 4 {shape} --lora --lora-rank 2 --merge --checkpoint {directory}/lora",
        f"train --method gkd --beta 0.3 {shape} --checkpoint {directory}/gkd",
        f"train --k 4 {online} {shape} --teacher-fraction 0.4 --sample-temperature 0.8 --checkpoint {directory}/online",
        f"eval --tasks embedded --limit 2 --model small={student} --no-chat",
        f"prune --teacher {teacher} --prompts {prompts} --limit 2 --output {directory}/pruned",
    ):
        run(*shlex.split(line), *([] if line.startswith("prune") else ["--run", directory]))
    return directory


@pytest.mark.parametrize(
    ("command", "artifact", "output"),
    [
        ("generate", "rollouts", "--rollouts"),
        ("score", "scores", "--scores"),
        ("train", "checkpoint", "--checkpoint"),
        ("train", "lora", "--checkpoint"),
        ("train", "gkd", "--checkpoint"),
        ("train", "online", "--checkpoint"),
        ("eval", "results/small", "--results"),
        ("prune", "pruned", "--output"),
    ],
)
def test_the_config_of_a_run_makes_the_same_artifact(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, artifact: str, output: str
) -> None:
    """In another directory, from another working directory, with the same identity and parts."""
    monkeypatch.chdir(tmp_path)
    again = tmp_path / "again"
    run(command, "--config", first / artifact / CONFIG_FILE, output, again)
    again = again / "small" if command == "eval" else again
    before, after = load_manifest(first / artifact), load_manifest(again)
    assert after.identity == before.identity
    assert after.summary == before.summary
    changed = {part.file for part in {*after.parts} ^ {*before.parts}}
    assert changed <= {"README.md"}  # the model card names directories
    assert [(model.role, model.name) for model in after.models] == [(model.role, model.name) for model in before.models]
    written = (again / CONFIG_FILE).read_text()
    assert written == (first / artifact / CONFIG_FILE).read_text()
    assert run("artifact", "show", again, "--config").rstrip("\n") == written.rstrip("\n")


def test_a_config_file_is_no_part_of_its_artifact(first: Path) -> None:
    rollouts = first / "rollouts"
    assert CONFIG_FILE not in [part.file for part in load_manifest(rollouts).parts]
    digest = content_digest(rollouts)
    text = (rollouts / CONFIG_FILE).read_text()
    (rollouts / CONFIG_FILE).write_text("k: 3")
    assert content_digest(rollouts) == digest
    verify_artifact(rollouts)
    (rollouts / CONFIG_FILE).write_text(text)


def test_a_stage_that_fails_at_once_leaves_no_config_file(student: Path, teacher: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 3)
    online = ("--student", student, "--teacher", teacher, "--prompts", prompts, "--max-new-tokens", 4)
    refuse("train", "--run", tmp_path / "run", *online, "--lora", "--lora-targets", "nothing")
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_models_are_recorded_by_absolute_path(
    student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative name means another model in another directory: config.yaml and `show --config` keep the right one."""
    for directory, model in (("here", student), ("elsewhere", teacher)):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "model").symlink_to(model)
    write_prompts(tmp_path / "prompts.jsonl", 2)
    monkeypatch.chdir(tmp_path / "here")
    words = (
        "generate --student model --prompts ../prompts.jsonl --rollouts ../r --max-new-tokens 4 --engine transformers"
    )
    run(*words.split())
    monkeypatch.chdir(tmp_path / "elsewhere")
    shown = yaml.safe_load(run("artifact", "show", "../r", "--config"))
    assert shown == yaml.safe_load((tmp_path / "r" / CONFIG_FILE).read_text())
    assert Path(shown["student"]).samefile(student)


def test_an_empty_list_of_benchmarks_is_refused(student: Path, tmp_path: Path) -> None:
    cause, _ = refuse("eval", "--tasks", "", "--model", f"m={student}", "--results", tmp_path / "results")
    assert "--tasks names no benchmark" in cause
    assert not (tmp_path / "results").exists()
