"""Weights reach vLLM as files: whole, streamed, with the names of the model's files, in a directory of the machine."""

import json
import multiprocessing
import signal
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from tests.helpers.forked_ranks import run_ranks
from tests.helpers.merged import merged_state_dict
from tsdkd.processes import rank
from tsdkd.stages.engines import weight_files
from tsdkd.stages.engines.weight_files import delete_files, machine_directory, write_adapter, write_weights


def adapted(path: Path) -> torch.nn.Module:
    torch.manual_seed(3)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"], init_lora_weights=False)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(path), settings)


def written(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


def test_weights_are_written_in_several_files_and_deleted(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "FILE_BYTES", 20_000)
    model = adapted(student)
    write_weights(model, torch.float32, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    expected, found = merged_state_dict(model.get_base_model()), written(tmp_path)
    assert found.keys() == expected.keys() == load_file(student / "model.safetensors").keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    delete_files(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_written_as_peft_writes_it(student: Path, tmp_path: Path) -> None:
    model = adapted(student)
    write_adapter(model, torch.float32, tmp_path)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    expected, found = load_file(tmp_path / "peft" / "adapter_model.safetensors"), written(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    settings = [json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path, tmp_path / "peft")]
    assert all(settings[0][name] == settings[1][name] for name in ("r", "lora_alpha", "peft_type"))


def test_the_first_rank_writes_the_whole_weights_of_a_sharded_student(student: Path, tmp_path: Path) -> None:
    def write_sharded() -> None:
        torch.distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,))
        model = adapted(student)
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for name, write in (("weights", write_weights), ("adapter", write_adapter)):
            own = tmp_path / f"{name}-{rank()}"
            own.mkdir()
            write(model, torch.float32, own)

    assert run_ranks(write_sharded, 2) == [0, 0]
    assert not list((tmp_path / "weights-1").iterdir()) + list((tmp_path / "adapter-1").iterdir())
    model = adapted(student)
    found, expected = written(tmp_path / "weights-0"), merged_state_dict(model.get_base_model())
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], value, atol=1e-6) for key, value in expected.items())
    adapter = written(tmp_path / "adapter-0")
    alone = {key: value for key, value in model.state_dict().items() if ".lora_" in key}
    assert all(torch.equal(adapter[key.replace(".default", "")], value) for key, value in alone.items())


def hold_directory(ready: Connection) -> None:
    with machine_directory(0) as directory:
        ready.send(directory)
        signal.pause()


def test_a_directory_stays_while_its_process_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "SHARED_MEMORY", tmp_path)
    processes = multiprocessing.get_context("fork")
    receiving, sending = processes.Pipe(duplex=False)
    owner = processes.Process(target=hold_directory, args=(sending,))
    owner.start()
    theirs = receiving.recv()
    with machine_directory(0) as own:
        assert sorted(tmp_path.iterdir()) == sorted([own, theirs])
    owner.kill()
    owner.join()
    assert list(tmp_path.iterdir()) == [theirs]
    with machine_directory(0) as own:
        assert list(tmp_path.iterdir()) == [own]
    assert not list(tmp_path.iterdir())


def test_a_small_shared_memory_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers often have 64 MB."""
    monkeypatch.setattr(weight_files, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with machine_directory(1 << 60) as directory:
        assert directory.parent == tmp_path / "tmp"
