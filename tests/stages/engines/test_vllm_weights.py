"""What only GPUs run, with a stand-in for vLLM's `LLM` that records calls: sleep between two batches."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tsdkd.stages.engines.vllm_weights import VllmWeights


def test_an_engine_in_one_process_ends_without_tidying() -> None:
    code = "import atexit, signal, time; from tsdkd.stages.engines.vllm_process import end_process; "
    code += "atexit.register(time.sleep, 60); signal.signal(signal.SIGTERM, end_process); print(); signal.pause()"
    with subprocess.Popen([sys.executable, "-uc", code], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        process.terminate()
        try:
            assert process.wait(10) == 0
        finally:
            process.kill()


class RecordingLLM:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.llm_engine = SimpleNamespace(add_lora=lambda request: self.calls.append(("add_lora", request.lora_path)))

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: self.calls.append((name, *given, *named.values()))


def test_an_engine_that_sleeps_wakes_for_its_weights_and_then_for_its_cache() -> None:
    """Level 2 drops the weights, so nothing is sampled between waking and loading."""
    llm = RecordingLLM()
    weights = VllmWeights(llm, None)
    weights.load(Path("/w"))
    weights.sleep(2)
    weights.load(Path("/w"))
    reload = ("collective_rpc", "reload_weights", {"weights_path": "/w"})
    assert llm.calls == [reload, ("sleep", 2), ("wake_up", ["weights"]), reload, ("wake_up", ["kv_cache"])]


def test_an_engine_with_an_adapter_keeps_its_weights() -> None:
    pytest.importorskip("vllm")
    llm = RecordingLLM()
    weights = VllmWeights(llm, None)
    weights.sleep(1)
    weights.load_adapter(Path("/a"))
    weights.load_adapter(Path("/a"))
    assert llm.calls == [("sleep", 1), ("wake_up", None), ("add_lora", "/a"), ("add_lora", "/a")]
    assert not weights.lora.load_inplace
