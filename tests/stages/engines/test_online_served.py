"""Training processes that share a vLLM server learn like one process, also when they are killed on the way."""

import signal
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import httpx2
import pytest

from tests.helpers.deaths import die_at
from tests.helpers.forked_ranks import DDP, run_ranks
from tests.helpers.fsdp_on_cpu import FSDP
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tests.helpers.teacher_server import FakeServer, random_model, serve
from tests.helpers.training import CONFIG, RecordingObserver, same_update, weights
from tests.helpers.vllm_server import SETTINGS
from tsdkd.artifacts.locks import is_locked
from tsdkd.artifacts.replacing import SAVED_STEPS
from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig
from tsdkd.stages.data.requests import Request
from tsdkd.stages.engines.online_vllm import VllmSampler
from tsdkd.stages.engines.vllm_served import ROLLOUT_SERVER, ServedEngine
from tsdkd.stages.engines.vllm_server import rollout_server
from tsdkd.stages.engines.weight_files import NAME, SHARED_MEMORY
from tsdkd.stages.models.spec import load_spec
from tsdkd.stages.teacher_server.connection import TEACHER
from tsdkd.stages.train.stage import train_online
from tsdkd.stages.train.trainer import DistillationTrainer

LORA = {"enable_lora": True, "max_lora_rank": 8}
SAMPLING = GenerateConfig(engine="vllm", dtype="float32", max_new_tokens=12, memory_fraction=0.05)
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("served") / "model", seed=5, head_dim=32)


@pytest.fixture(scope="module")
def url(served: Path) -> Iterator[str]:
    """Of a server that runs as --rollout-gpus starts it, without GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        with rollout_server(load_spec(str(served)), SAMPLING, 128, LORA, None) as url:
            yield url
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(url)


@needs_vllm
@pytest.mark.parametrize(
    ("strategy", "lora", "ahead", "first_call"),
    [(DDP, None, 0, 11), (FSDP, LoRAConfig(rank=4, merge=True), 1, 17)],
    ids=["DDP", "FSDP2, LoRA, sampling ahead"],
)
def test_two_processes_killed_three_times_end_like_one(
    url: str,
    served: Path,
    teacher: Path,
    tmp_path: Path,
    strategy: dict[str, str],
    lora: LoRAConfig | None,
    ahead: int,
    first_call: int,
) -> None:
    """Responses are sampled by seed; rank 0 is killed with -9. The server keeps what it has."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", 11)
    online = OnlineConfig(sampling=SAMPLING, rollout_url=url, rollout_ahead=ahead)
    config = replace(CONFIG, online=online, lora=lora, save_steps=1)
    observer = RecordingObserver()
    train_online(prompts, str(served), str(teacher), tmp_path / "one", config, observer=observer)
    assert any("vLLM got the student's weights 6 times" in message for message in observer.messages)
    deaths = (
        die_at(ServedEngine, "_generate_one", first_call),  # step 2 samples: its own batch, or the next one
        die_at(VllmSampler, "_check", 2),  # in step 3, the weights are in vLLM
        die_at(DistillationTrainer, "compute_loss", 2),  # step 4 learns
    )

    def learn() -> None:
        train_online(prompts, str(served), str(teacher), tmp_path / "two", config)

    for steps, death in enumerate(deaths, 1):
        assert run_ranks(learn, 2, strategy, first=death)[0] == -signal.SIGKILL
        assert (tmp_path / "two" / SAVED_STEPS / f"checkpoint-{steps}").is_dir()
    assert run_ranks(learn, 2, strategy) == [0, 0]
    assert same_update(weights(tmp_path / "two"), weights(tmp_path / "one"), weights(served))
    left = [directory for directory in SHARED_MEMORY.glob(f"{NAME}*") if not is_locked(directory)]
    assert not [directory for directory in left if directory.exists()]  # others are of runs beside the tests


@needs_vllm
def test_a_server_with_other_settings_is_refused(url: str, served: Path) -> None:
    """The message names each wrong setting, and the command that starts the right server."""
    spec = load_spec(str(served))
    with pytest.raises(InputError) as caught:
        ServedEngine(url, spec, GenerateConfig(dtype="bfloat16"), 200, LORA | {"max_lora_rank": 16})
    assert all(part in caught.value.cause for part in ("not bfloat16", "128 tokens, not 200", "LoRA"))
    assert "VLLM_SERVER_DEV_MODE=1" in caught.value.remedy
    assert "--max-lora-rank 16" in caught.value.remedy


def test_a_server_that_fails_on_the_way_is_not_asked_again(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that a supervisor started again has the weights it was started with."""
    monkeypatch.setattr(ServedEngine, "_find_model", lambda *_: "model")
    with serve(FakeServer(random_model(10), failures=["503"])) as fake:
        with (
            ServedEngine(fake.url, load_spec(str(student)), SAMPLING, 128, {}) as engine,
            pytest.raises(TsdkdError, match="run the same command"),
        ):
            engine.sample_with_log_probs([Request("a", [1], 0)], 4)
        assert len(fake.paths) == 1


def test_a_server_of_another_model_is_named_when_it_gets_the_weights(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServedEngine, "_find_model", lambda *_: "model")
    with (
        serve(FakeServer(random_model(10), failures=["500"])) as fake,
        ServedEngine(fake.url, load_spec(str(student)), SAMPLING, 128, {}) as engine,
        pytest.raises(TsdkdError, match="500: Try again") as caught,
    ):
        engine.load(tmp_path)
    assert "api_server" in caught.value.remedy


def test_servers_of_another_kind_are_refused_with_the_command_of_the_right_one(student: Path) -> None:
    with serve(FakeServer(random_model(10))) as fake, pytest.raises(InputError, match="another form") as caught:
        ServedEngine(fake.url, load_spec(str(student)), SAMPLING, 128, {})
    assert "api_server" in caught.value.remedy


def test_a_server_gets_the_key_of_rollout_servers(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TEACHER.key_variable, "teacher")
    monkeypatch.setenv(ROLLOUT_SERVER.key_variable, "another")
    spec, fake = load_spec(str(student)), FakeServer(random_model(10), key="secret")
    with serve(fake):
        with pytest.raises(TsdkdError, match="refuses access") as caught:
            ServedEngine(fake.url, spec, SAMPLING, 128, {})
        assert caught.value.remedy == f"Set {ROLLOUT_SERVER.key_variable} to the server's key."
        monkeypatch.setenv(ROLLOUT_SERVER.key_variable, "secret")
        with pytest.raises(InputError, match="another form"):  # it lets us in, and is no vLLM
            ServedEngine(fake.url, spec, SAMPLING, 128, {})


def test_servers_on_other_machines_and_missing_ones_are_refused(student: Path) -> None:
    spec = load_spec(str(student))
    with pytest.raises(InputError, match="loopback alone"):
        ServedEngine("http://example.com:8000", spec, SAMPLING, 128, {})
    with pytest.raises(InputError, match="No server responds") as caught:
        ServedEngine("http://127.0.0.1:9", spec, SAMPLING, 128, {})
    assert "api_server" in caught.value.remedy
    assert str(student) in caught.value.remedy
