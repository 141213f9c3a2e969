"""Options are declared once, completely, and without the libraries of the command line."""

import subprocess
import sys
from dataclasses import fields

import pytest

from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.groups import COMMON, GROUPS
from tsdkd.stages.config.inspect import InspectConfig
from tsdkd.stages.config.objective import OBJECTIVE_OPTIONS
from tsdkd.stages.config.option import config_options
from tsdkd.stages.config.recorded import CONFIGS
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import ONLINE_SAMPLING, TrainConfig

KINDS = {**CONFIGS, "inspect": InspectConfig}


@pytest.mark.parametrize("command", KINDS)
def test_options_are_distinct_and_explained(command: str) -> None:
    options = config_options(KINDS[command])
    assert len({option.name for option in options}) == len({option.parameter for option in options}) == len(options)
    for option in options:
        assert option.option.help[0].isupper() or option.option.help[0].isalpha()
        assert option.option.help.endswith(".")
        assert option.option.group in GROUPS


@pytest.mark.parametrize("command", sorted(set(KINDS) - {"train"}))
def test_every_field_of_a_flat_configuration_is_an_option(command: str) -> None:
    keys = list(dict.fromkeys(option.key.partition(".")[0] for option in config_options(KINDS[command])))
    assert keys == [field.name for field in fields(KINDS[command])]


def test_the_objectives_table_has_every_field() -> None:
    assert {*OBJECTIVE_OPTIONS, "policy_gradient_weight"} == {field.name for field in fields(TSDKDConfig)}


def test_nested_configurations_become_options() -> None:
    names = {option.key: option.name for option in config_options(TrainConfig)}
    assert names["objective.temperature"] == "temperature"
    assert names["online.sampling.temperature"] == "sample-temperature"
    assert names["online.student_fraction"] == "lambda"
    assert names["online.replay.phi_step"] == "phi-step"
    assert (names["lora"], names["lora.rank"], names["lora.merge"]) == ("lora", "lora-rank", "merge")
    assert {key.split(".")[2] for key in names if key.startswith("online.sampling.")} == set(ONLINE_SAMPLING)
    defaults = {option.name: option.default for option in config_options(TrainConfig)}
    assert (defaults["epochs"], defaults["lora"], defaults["phi-step"]) == (3.0, False, 0.1)


def test_a_dozen_options_are_common() -> None:
    common = [option.name for option in config_options(TrainConfig) if option.group == COMMON]
    assert common == [
        *("method", "opener", "lora", "learning-rate", "epochs", "batch-size", "held-out", "eval-steps"),
    ]


def test_values_are_parsed() -> None:
    options = {option.name: option for option in config_options(TrainConfig)}
    assert options["released"].parse("ranking,opener") == ("ranking", "opener")
    assert options["released"].parse(None) == options["tracker"].parse([]) == ()
    assert (options["opener"].parse("0.25"), options["opener"].parse("adaptive")) == (0.25, "adaptive")
    with pytest.raises(InputError, match="--opener is 'long'"):
        options["opener"].parse("long")
    assert {option.name: option.choices for option in config_options(GenerateConfig)}["engine"] == (
        "auto",
        "vllm",
        "transformers",
    )


def test_configurations_load_without_the_command_line() -> None:
    modules = [f"tsdkd.stages.config.{name}" for name in (*KINDS, "recorded")]
    program = (
        f"import sys\nfor name in {modules}: __import__(name)\n"
        "assert not {'torch', 'typer', 'yaml', 'rich'} & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_the_shown_chat_format_is_the_one_that_a_stage_takes() -> None:
    shown = {
        kind.__name__: [o.option.shown for o in config_options(kind) if o.name.startswith("chat-template")]
        for kind in (GenerateConfig, ScoreConfig, TrainConfig, InspectConfig, EvalConfig)
    }
    own, recorded = ["the model's own", "none"], ["as recorded"] * 2
    assert shown == {
        "GenerateConfig": own,
        "ScoreConfig": recorded,
        "TrainConfig": ["as recorded, else the model's own", "as recorded, else none"],
        "InspectConfig": recorded,
        "EvalConfig": own,
    }
