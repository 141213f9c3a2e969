"""Real vLLM on a CPU: its responses, the engine check, resumed and stopped runs, and its errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.adapters import save_adapter
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.reader import read_artifact
from tsdkd.errors import TsdkdError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.data.requests import RequestBatch
from tsdkd.stages.engines import choice, engine_check
from tsdkd.stages.engines.transformers_engine import TransformersEngine, sample_responses
from tsdkd.stages.engines.vllm_engine import VllmEngine
from tsdkd.stages.generate.requests import Authorship, PromptRequests
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.spec import load_spec

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

Contents = Callable[[Path], dict[str, bytes]]
CONFIG = GenerateConfig(engine="vllm", max_new_tokens=40, part_size=8, samples_per_prompt=2, memory_fraction=0.1)


@pytest.fixture(autouse=True, scope="module")
def vllm_is_installed() -> Iterator[None]:
    """Undo the patch of conftest.py, and switch off compilation, which takes half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "has_vllm", lambda: True)
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        yield


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with six padding rows and the smallest attention heads that vLLM has kernels for."""
    return save_tiny_model(tmp_path_factory.mktemp("served") / "model", seed=5, head_dim=32)


@pytest.fixture(scope="module")
def run(served: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four commands as a user types them, sampled with vLLM."""
    directory = tmp_path_factory.mktemp("chain")
    prompts = write_prompts(directory / "prompts.jsonl", 16)
    options = ["--memory-fraction", "0.1", "--max-new-tokens", "40", "--part-size", "8", "--samples-per-prompt", "2"]
    chain = [
        ["generate", "--student", served, "--prompts", prompts, "--engine", "vllm", *options],
        ["score", "--teacher", teacher, "--k", 4],
        ["train", "--k", 4, "--epochs", 1, "--batch-size", 8, "--precision", "float32"],
    ]
    for stage in chain:
        command = [sys.executable, "-m", "tsdkd", *map(str, stage), "--run", str(directory / "run")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "error" not in done.stderr
    return directory


def test_score_and_train_read_its_rollouts(run: Path, served: Path) -> None:
    manifest = load_manifest(run / "run" / "rollouts")
    assert manifest.engine == manifest.config["engine"] == "vllm"
    assert manifest.libraries["vllm"].startswith("0.")
    rows = read_artifact(run / "run" / "rollouts", "rollouts").table().to_pylist()
    assert len({row["sample_id"] for row in rows}) == len(rows) == 32
    end = load_model(str(served)).tokenizer.eos_token_id
    reasons = Counter(row["finish_reason"] for row in rows)
    assert set(reasons) == {"stop", "length"}
    for row in rows:
        ids = row["response_ids"]
        assert end not in ids[:-1]
        assert row["finish_reason"] == ("stop" if ids[-1] == end else "length")
        assert len(ids) == 40 or ids[-1] == end
    assert max(token for row in rows for token in row["response_ids"]) <= 257  # no padding row
    for i in range(0, 32, 2):  # two samples of one prompt have different seeds
        assert rows[i]["response_ids"] != rows[i + 1]["response_ids"]
    assert load_manifest(run / "run" / "checkpoint").state == "complete"


def test_a_resumed_run_on_two_workers_ends_with_the_same_bytes(run: Path, served: Path, contents: Contents) -> None:
    """One of four parts is complete; two workers, each with an engine, sample the others in any order."""
    whole, cut = run / "run" / "rollouts", run / "run" / "cut"
    shutil.copytree(whole, cut)
    manifest = json.loads((cut / MANIFEST_FILE).read_text())
    manifest |= {"state": "partial", "summary": {}, "parts": manifest["parts"][:1]}
    (cut / MANIFEST_FILE).write_text(json.dumps(manifest))
    for part in sorted(cut.glob("*.parquet"))[1:]:
        part.unlink()
    generate(run / "prompts.jsonl", str(served), cut, replace(CONFIG, data_parallel=2))
    assert contents(cut) == contents(whole)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_no_process(
    prompts: Path, served: Path, tmp_path: Path, signal_number: signal.Signals
) -> None:
    """Ctrl-C while vLLM loads exits with 130; after kill -9 of the parent the child ends by itself."""
    command = [sys.executable, "-m", "tsdkd", "generate", "--student", str(served), "--engine", "vllm"]
    command += ["--prompts", str(prompts), "--run", str(tmp_path / "run"), "--max-new-tokens", "8"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    errors = tmp_path / "stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    while not (children := children_of(process.pid)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal_number)
    assert process.wait(timeout=120) == (130 if signal_number == signal.SIGINT else -signal.SIGKILL)
    deadline = time.monotonic() + 120
    while [child for child in children if Path(f"/proc/{child}").exists()]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    if signal_number == signal.SIGINT:
        assert "Interrupted" in errors.read_text()
        assert "Traceback" not in errors.read_text()


def children_of(pid: int) -> list[int]:
    """Ids of child processes, without the resource tracker of multiprocessing."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.fixture(scope="module")
def adapter(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(served, tmp_path_factory.mktemp("adapter") / "adapter", rank=3)


@pytest.fixture(scope="module")
def batch(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> RequestBatch:
    prompts = Prompts(write_prompts(tmp_path_factory.mktemp("batch") / "p.jsonl", 6))
    requests = PromptRequests(prompts, load_spec(str(adapter)).tokenizer, CONFIG, 8, 0)
    return next(requests.parts(Authorship("student"), requests.count()))


@pytest.fixture(scope="module")
def engine(adapter: Path) -> Iterator[VllmEngine]:
    """Serves the adapter."""
    with VllmEngine(load_spec(str(adapter)), CONFIG, 200) as engine:
        yield engine


def test_the_engine_check_distinguishes_an_adapter_from_its_base(
    engine: VllmEngine, batch: RequestBatch, adapter: Path, served: Path
) -> None:
    engine_check.check_engine(engine, batch.requests, {"student": load_spec(str(adapter))}, "student", CONFIG)
    with pytest.raises(TsdkdError, match="disagree about") as caught:
        engine_check.check_engine(engine, batch.requests, {"student": load_spec(str(served))}, "student", CONFIG)
    assert caught.value.remedy == engine_check.WEIGHTS_REMEDY


@pytest.mark.parametrize("sampling", [{"top_k": 2}, {"temperature": 0.5}, {"repetition_penalty": 3.0}], ids=str)
def test_the_engine_check_detects_another_sampling_setting(
    engine: VllmEngine, batch: RequestBatch, adapter: Path, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, float]
) -> None:
    monkeypatch.setattr(engine, "sampling", engine.sampling | sampling)
    with pytest.raises(TsdkdError, match="disagree about") as caught:
        engine_check.check_engine(engine, batch.requests, {"student": load_spec(str(adapter))}, "student", CONFIG)
    if "repetition_penalty" not in sampling:  # it can look like other weights
        assert caught.value.remedy == engine_check.SAMPLING_REMEDY


def test_greedy_responses_equal_those_of_transformers(
    engine: VllmEngine, batch: RequestBatch, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "sampling", engine.sampling | {"temperature": 0.0})
    ((_, responses),) = engine.sample(iter([batch]), lambda _: None)
    prompts = [request.prompt_ids for request in batch.requests]
    expected = sample_responses(load_model(str(adapter)), prompts, CONFIG.max_new_tokens, temperature=0)
    assert [response.ids for response in responses] == expected


def test_stop_strings_cut_greedy_responses_as_transformers_does(served: Path, batch: RequestBatch) -> None:
    """In an engine with a tokenizer; both engines also name the same reasons, with end tokens of another model."""
    model = load_model(str(served))
    config = replace(CONFIG, temperature=0.0, max_new_tokens=24)
    ends = [*range(20), *model.end_ids]
    ended = replace(model, pair_end_ids=ends)
    ((_, whole),) = TransformersEngine(ended, config).sample(iter([batch]), lambda _: None)
    texts = [model.tokenizer.decode(response.ids) for response in whole]
    pairs = [text[n : n + 2] for text in texts for n in range(3, len(text) - 1) if text[n : n + 2].isascii()]
    config = replace(config, stop=(*pairs[::9], "<|end|>", "é"), rollout_tokens=12)
    ((_, expected),) = TransformersEngine(ended, config).sample(iter([batch]), lambda _: None)
    with VllmEngine(replace(load_spec(str(served)), end_ids=ends), config, 200) as engine:
        ((_, responses),) = engine.sample(iter([batch]), lambda _: None)
    assert responses == expected
    assert {response.finish_reason for response in responses} == {"stop", "early"}
    assert any(response.finish_reason == "stop" and response.ids[-1] not in ends for response in responses)


def test_the_same_batch_gets_the_same_responses_and_progress_counts_them(
    engine: VllmEngine, batch: RequestBatch
) -> None:
    done: list[int] = []
    (_, first), (_, second) = engine.sample(iter([batch, batch]), done.append)
    assert first == second
    assert sum(done) == 2 * len(batch.requests)


def test_more_prompts_than_one_engine_step_reads(engine: VllmEngine, batch: RequestBatch) -> None:
    """Of 10,000 prompt tokens no prompt is read in chunks: each response is the same as in a small batch."""
    requests = [replace(batch.requests[0], prompt_ids=[i, *range(148)], seed=i) for i in range(70)]
    few, many = (RequestBatch(chosen) for chosen in (requests[:8], requests))
    (_, of_few), (_, of_many) = engine.sample(iter([few, many]), lambda _: None)
    assert [response.ids[:5] for response in of_many[:8]] == [response.ids[:5] for response in of_few]


def test_a_model_that_vllm_refuses_gives_a_one_line_error(student: Path, prompts: Path, tmp_path: Path) -> None:
    """vLLM has no kernel for attention heads of 8."""
    with pytest.raises(TsdkdError, match="vLLM failed: ") as caught:
        generate(prompts, str(student), tmp_path / "r", CONFIG)
    assert "\n" not in caught.value.cause
    assert "--engine transformers" in caught.value.remedy
    log = Path(caught.value.remedy.split()[-1].rstrip("."))
    assert "Traceback" in log.read_text()
    log.unlink()
    assert not (tmp_path / "r").exists()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") is None
