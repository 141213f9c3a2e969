"""Errors of libraries become one line of cause and one of remedy."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers.commands import refuse
from tests.helpers.disk import files_of_at_most
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tests.helpers.runs import make_run
from tsdkd.artifacts import opening
from tsdkd.artifacts.files import JOURNAL_FILE
from tsdkd.cli import app
from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.engines.vllm_engine import translate_vllm_errors
from tsdkd.stages.models.device import require_device


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "p.jsonl", 2)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e-320", "1e300", "1e-5", "1e5"])
@pytest.mark.parametrize("option", ["--temperature", "--sample-temperature"])
def test_a_temperature_out_of_range(value: str, option: str, prompts: Path, tmp_path: Path) -> None:
    command = ["generate"] if option == "--temperature" else ["train", "--lambda", "1", "--teacher", "t"]
    at = ["--rollouts" if command == ["generate"] else "--checkpoint", tmp_path / "x"]
    cause, remedy = refuse(*command, "--student", "s", "--prompts", prompts, *at, option, value)
    assert "emperature" in cause
    assert "between" in remedy or "--help" in remedy
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--seed", ["-1", "4294967296", "18446744073709551616"]),
        ("--batch-size", ["18446744073709551616", "2147483648", "0"]),
        ("--max-grad-norm", ["nan", "inf", "0", "-1"]),
        ("--learning-rate", ["nan", "inf"]),
        ("--epochs", ["nan", "inf", "1e30", "0"]),
        ("--tau", ["nan", "inf", "0"]),
        ("--alpha", ["nan", "inf"]),
        ("--opener", ["nan", "inf"]),
        ("--em-weight", ["nan", "inf", "1e300"]),
        ("--weight-decay", ["nan", "inf"]),
        ("--warmup-ratio", ["nan"]),
        ("--lora-dropout", ["nan"]),
    ],
)
def test_a_number_out_of_range(option: str, values: list[str], tmp_path: Path) -> None:
    for value in values:
        more = ["--lora"] if "lora" in option else []
        cause, remedy = refuse("train", "--run", tmp_path, *more, option, value)
        assert option.strip("-").replace("-", "_") in cause.replace("-", "_").replace("LoRA's ", "lora_")
        assert "Choose" in remedy or "--help" in remedy


@pytest.mark.parametrize("device", ["cuda:7", "mps", "foo", "meta", "cpu:3", ""])
def test_a_device_that_does_not_exist(device: str, student: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="This machine has no device"):
        require_device(device)
    models = ["--student", student, "--teacher", student, "--prompts", prompts]
    cause, remedy = refuse("train", *models, "--checkpoint", tmp_path / "c", "--teacher-device", device)
    assert "no device" in cause
    assert "cpu" in remedy
    assert not (tmp_path / "c").exists()
    require_device("cpu")


@pytest.mark.parametrize("chain", [["."], ["../adapter"], ["../other", "../adapter"]])
def test_an_adapter_that_names_an_adapter(chain: list[str], student: Path, prompts: Path, tmp_path: Path) -> None:
    for name, base in zip(("adapter", "other"), chain, strict=False):
        path = tmp_path / name
        path.mkdir()
        settings = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 1, "target_modules": ["q_proj"]}
        (path / "adapter_config.json").write_text(json.dumps(settings))
        shutil.copy(student / "config.json", path)
    at = ["--prompts", prompts, "--run", tmp_path / "run"]
    cause, remedy = refuse("generate", "--student", tmp_path / "adapter", *at)
    assert "as its base model, which is an adapter itself" in cause
    assert "base_model_name_or_path" in remedy


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["2", 2.5, [[2]], ["a"], True, {"a": 1}])
def test_an_end_token_of_a_wrong_type(file: str, value: object, prompts: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", seed=1)
    (model / "generation_config.json").unlink()
    path = model / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | {"eos_token_id": value}))
    at = ["--student", model, "--prompts", prompts, "--run", tmp_path / "run"]
    cause, remedy = refuse("generate", *at)
    assert "eos_token_id" in cause or "config" in cause
    assert "generation_config.json" in cause + remedy
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [-1, 10**6, [-1, 10**9]])
def test_an_end_token_outside_the_vocabulary_ends_nothing(value: object, prompts: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", seed=1)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    command = ["generate", "--student", model, "--prompts", prompts, "--run", tmp_path / "run", "--max-new-tokens", 2]
    assert CliRunner().invoke(app, [str(word) for word in command]).exit_code == 0


def test_files_that_are_not_utf8(student: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    plan.write_bytes(b"tsdkd generate\n# caf\xe9\n")
    assert refuse("plan", plan) == (f"{plan}, line 2: not UTF-8.", "Save the file as UTF-8.")
    assert "not UTF-8" in refuse("plan", plan)[0]
    options = tmp_path / "options.yaml"
    options.write_bytes(b"k: caf\xe9\n")
    assert f"{options} cannot be read" in refuse("score", "--config", options)[0]
    run = make_run(tmp_path / "run")
    journal = run / "rollouts" / JOURNAL_FILE
    journal.write_bytes(b'\xff\n{"started": 1, "x": 2}\n3\nnull\n{"exit": "failed"}\n')
    assert f"{journal} cannot be read" in refuse("report", run)[0]
    journal.unlink()
    (run / "checkpoint" / "metrics.jsonl").write_bytes(b'{"loss": 1.0}\n{"caf\xe9": 1}\n')
    cause, _ = refuse("report", run)
    assert cause.startswith(f"{run / 'checkpoint' / 'metrics.jsonl'} cannot be read ('utf-8' codec")
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        model = shutil.copytree(student, tmp_path / f"model-{file}")
        (model / file).write_bytes(b'{"model_type": "caf\xe9"}')
        at = ["--student", model, "--prompts", write_prompts(tmp_path / "p.jsonl", 1), "--run", tmp_path / "new"]
        assert str(model) in refuse("generate", *at)[0]


@pytest.mark.parametrize("content", ["[" * 5000, "{" * 5000, "seed: " + "9" * 5000, "temperature: " + "9" * 400])
def test_a_file_of_options_that_is_too_deep_or_too_large(content: str, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text(content)
    cause, _ = refuse("generate", "--config", tmp_path / "options.yaml")
    assert str(tmp_path / "options.yaml") in cause


@pytest.mark.parametrize("drop", [4, 9])
def test_a_plan_of_a_prune_that_drops_more_layers_than_there_are(drop: int, teacher: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    plan.write_text(f"tsdkd prune --teacher {teacher} --drop {drop} --output {tmp_path / 'x'}\n")
    cause, remedy = refuse("plan", plan)
    assert cause == f"Line 1: --drop is {drop}, but {teacher} has 4 layers."
    assert "keep at least one" in remedy


def test_a_limit_of_the_process_is_not_a_full_disk(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    for size in (500, 4_000, 50_000):
        with files_of_at_most(size):
            cause, remedy = refuse(
                "prune", "--teacher", teacher, "--prompts", prompts, "--output", tmp_path / "x", code=1
            )
        assert str(tmp_path / "x") in cause
        assert f"limit of {size:,} bytes a file (`ulimit -f`)" in remedy


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_complete_artifact_on_a_read_only_disk_is_skipped(
    code: int, student: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", "--student", student, "--prompts", prompts, "--run", tmp_path / "run", "--max-new-tokens", 2]
    assert CliRunner().invoke(app, [str(word) for word in command]).exit_code == 0

    def read_only(path: Path) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(opening, "lock_for_writing", read_only)
    monkeypatch.setattr(opening, "delete_leftovers", read_only)
    again = CliRunner().invoke(app, [str(word) for word in command])
    assert again.exit_code == 0, again.output
    assert "is complete: nothing to do" in again.stderr
    for reading in (["artifact", "show"], ["artifact", "verify"], ["artifact", "lineage"]):
        assert CliRunner().invoke(app, [*reading, str(tmp_path / "run" / "rollouts")]).exit_code == 0
    refuse(*command, "--overwrite", code=1)


def raise_from_vllm(error: Exception) -> None:
    with translate_vllm_errors():
        raise error


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (ValueError("No available memory for the KV cache.\nmore"), "Change --memory-fraction"),
        (RuntimeError("Model architectures ['X'] are not supported"), "Use --engine transformers"),
        (AssertionError(), "--debug"),
    ],
)
def test_an_error_of_vllm_in_this_process(error: Exception, remedy: str) -> None:
    with pytest.raises(TsdkdError) as caught:
        raise_from_vllm(error)
    assert caught.value.cause.startswith("vLLM failed: ")
    assert "\n" not in caught.value.cause
    assert remedy in caught.value.remedy
