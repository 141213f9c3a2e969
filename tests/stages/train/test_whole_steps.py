"""Methods that select from whole steps, or at random: resumption, one reading by a server, sharded weights, replays."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import run as command
from tests.helpers.deaths import die_at
from tests.helpers.forked_ranks import FSDP, run_ranks
from tests.helpers.own_methods import OF_WHOLE_STEPS, write_method
from tests.helpers.teacher_server import FakeServer, model_at, serve
from tests.helpers.training import CONFIG, SAMPLING, metrics
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.core import TSDKDConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.recorded import check_config
from tsdkd.stages.config.train import OnlineConfig, TrainConfig
from tsdkd.stages.data import served_scoring
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.methods import find_method
from tsdkd.stages.models import distributed
from tsdkd.stages.teacher_server.server import TeacherServer
from tsdkd.stages.train.stage import train_offline, train_online, train_served
from tsdkd.stages.train.step_selection import StepSelection
from tsdkd.stages.train.trainer import DistillationTrainer

Contents = Callable[[Path], dict[str, bytes]]


def settings(method: str | Path, **more: object) -> TrainConfig:
    return replace(CONFIG, method=str(method), objective=TSDKDConfig(), **more)


@pytest.mark.parametrize(
    ("method", "online", "ranks"),
    [
        ("random-kd", False, 1),
        ("random-kd", True, 1),
        ("of whole steps", False, 2),
        ("of whole steps", True, 2),
    ],
)
def test_a_killed_run_ends_with_the_same_bytes(
    run: Path,
    prompts: Path,
    student: Path,
    teacher: Path,
    tmp_path: Path,
    contents: Contents,
    method: str,
    online: bool,
    ranks: int,
) -> None:
    """Random numbers and, with statistics of whole steps, a state; killed after a step that was saved."""
    file = write_method(tmp_path / "m.py") if method == "of whole steps" else method
    config = settings(file, micro_batch_size=1, epochs=1, save_steps=1)
    if online:
        config = replace(config, online=OnlineConfig(sampling=SAMPLING))

    def learn(output: Path) -> None:
        if online:
            train_online(prompts, str(student), str(teacher), output, config)
        else:
            train_offline(run / "rollouts", run / "scores", str(student), output, config)

    death = die_at(DistillationTrainer, "compute_loss", 4 * 2 // ranks + 1)  # in the third step
    run_ranks(lambda: learn(tmp_path / "whole"), ranks)
    assert run_ranks(lambda: learn(tmp_path / "killed"), ranks, first=death)[0] == -9
    assert (tmp_path / "killed" / "resume" / "checkpoint-2").is_dir()
    run_ranks(lambda: learn(tmp_path / "killed"), ranks)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_server_reads_each_response_of_a_step_once(
    prompts: Path, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers serve the selection, the losses, and every measurement on held-out prompts."""
    monkeypatch.setattr(served_scoring, "MIN_CAPTURED_MASS", 0.3)  # the tiny teacher spreads its probability
    read, requests = TeacherServer.read, []
    monkeypatch.setattr(TeacherServer, "read", lambda self, given: requests.append(len(given)) or read(self, given))
    method = write_method(tmp_path / "m.py", WITHOUT_HIDDEN)
    config = settings(method, batch_size=2, micro_batch_size=1, epochs=1, held_out=0.3, eval_steps=1)
    config = replace(config, online=OnlineConfig(sampling=SAMPLING, teacher_top_k=200))
    with serve(FakeServer(model_at(teacher), max_logprobs=250)) as fake:
        train_served(prompts, str(student), fake.url, None, tmp_path / "c", config)
    steps = [entry for entry in metrics(tmp_path / "c") if "loss" in entry]
    held_out, *by_step = requests
    assert (held_out + sum(by_step), len(by_step)) == (10, len(steps))
    assert len(steps) > 2


WITHOUT_HIDDEN = """
from tsdkd.methods import Divergence, Method


def select(features, options):
    return {"kl": features.batch_mean(features.forward_kl >= features.forward_kl[features.mask].median())}


METHOD = Method(
    name="above-median",
    full_name="a test",
    description="a divergence above its median over the step",
    losses={"kl": Divergence.jsd(0)},
    select=select,
    features=("forward_kl",),
    scope="batch",
)
"""


def test_features_are_read_from_sharded_weights(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rank holds a copy of the student."""
    monkeypatch.setattr(distributed, "AutoModelForCausalLM", None)
    config = settings(write_method(tmp_path / "m.py"), micro_batch_size=1)

    def learn() -> None:
        train_offline(run / "rollouts", run / "scores", str(student), tmp_path / "c", config)

    assert run_ranks(learn, 2, FSDP) == [0, 0]


def test_a_users_method_can_replay(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path, contents: Contents
) -> None:
    """The complete checkpoint is read again, although reading it runs no file of a method."""
    text = OF_WHOLE_STEPS.replace('scope="batch",', 'scope="batch",\n    uses_replay=True,')
    method, rollouts = write_method(tmp_path / "m.py", text), tmp_path / "rollouts"
    generate(prompts, None, rollouts, GenerateConfig(max_new_tokens=8, policy="teacher"), teachers={"": str(teacher)})
    paths = ["--rollouts", rollouts, "--teacher", teacher, "--student", student, "--checkpoint", tmp_path / "c"]
    options = ["--batch-size", 2, "--micro-batch-size", 1, "--epochs", 1, "--held-out", 0.3, "--eval-steps", 1]
    options += ["--replay-capacity", 2, "--phi", 1, "--max-new-tokens", 8, "--engine", "transformers"]
    command("train", "--method", method, *paths, *options, "--precision", "float32")
    assert all(entry["loss"] > 0 for entry in metrics(tmp_path / "c") if "loss" in entry)
    before = contents(tmp_path / "c")
    command("train", "--config", tmp_path / "c" / "config.yaml", *paths)
    assert contents(tmp_path / "c") == before
    recorded = load_manifest(tmp_path / "c").config
    with pytest.raises(ValueError, match=r"config\.online\.replay"):
        check_config("checkpoint", recorded | {"online": recorded["online"] | {"replay": {"phi": "much"}}})


def test_equal_responses_share_their_weights(tmp_path: Path) -> None:
    """A step of replays may hold a response twice, on two ranks; its weights count once for each."""
    text = WITHOUT_HIDDEN.replace('("forward_kl",)', '("uniform",)').replace(
        "features.forward_kl >= features.forward_kl[features.mask].median()",
        "features.batch_ranks(features.uniform * 0) < 5",
    )
    response = {"sample_id": "a", "prompt_id": "a", "author": "student", "turn": 0, "response_ids": [1] * 3}
    other = response | {"sample_id": "b"}
    selection = StepSelection(find_method(str(write_method(tmp_path / "m.py", text))), {}, seed=0)
    selection.select_step([([response, other], {}), ([response], {})], step=0, steps=1, ranks=1)
    selected = selection.selected([response, other, response], torch.ones(3, 3).bool())
    weights = selected["kl"].weights
    assert torch.equal(weights[0], weights[2])
    assert float(weights.sum()) == pytest.approx(3)  # the mean over the step's three responses, each of weight 1
