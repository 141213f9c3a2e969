"""Online training with a served teacher: its update beside that of the loaded one, and refusals."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.teacher_server import FakeServer, model_at, random_model, serve
from tests.helpers.training import CONFIG, SAMPLING, cut, live_parameters, metrics
from tsdkd.core import TSDKDConfig
from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.config.train import OnlineConfig
from tsdkd.stages.data import served_scoring
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.teacher_server import connection
from tsdkd.stages.train import stage
from tsdkd.stages.train import teacher as online_teacher
from tsdkd.stages.train.stage import train_online, train_served

Files = Callable[[Path], dict[str, bytes]]
ONLINE = replace(CONFIG, online=OnlineConfig(sampling=SAMPLING, teacher_top_k=200), batch_size=10, epochs=1)


@pytest.fixture
def fake(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(connection, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(served_scoring, "MIN_CAPTURED_MASS", 0.3)  # the tiny teacher spreads its probability
    with serve(FakeServer(model_at(teacher), max_logprobs=250)) as server:
        yield server


def test_a_served_teacher_gives_nearly_the_update_of_a_loaded_one(
    fake: FakeServer, prompts: Path, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = replace(ONLINE, online=OnlineConfig(sampling=SAMPLING))
    train_online(prompts, str(student), str(teacher), tmp_path / "loaded", loaded)
    monkeypatch.setattr(online_teacher, "_load_teacher", pytest.fail)
    checkpoint = train_served(prompts, str(student), fake.url, None, tmp_path / "served", ONLINE)
    (exact,), (served,) = metrics(tmp_path / "loaded"), metrics(tmp_path / "served")
    assert served["indirect"] == pytest.approx(exact["indirect"], rel=0.02)  # some candidates are outside the top K
    assert served["entropy"] == pytest.approx(exact["entropy"], rel=1e-5)
    assert served["teacher_entropy"] == pytest.approx(exact["teacher_entropy"], rel=0.02)
    assert served["direct"] == pytest.approx(exact["direct"], rel=0.1)
    manifest = checkpoint.manifest
    assert manifest.model("teacher").name == "served/teacher"
    assert manifest.config["online"]["teacher_top_k"] == 200


class ParameterObserver(SilentObserver):
    """Counts the parameters of the process after each step, without those that were there before."""

    def __init__(self) -> None:
        self.before, self.counts = live_parameters(), set[int]()

    @contextmanager
    def progress(self, *_: object) -> Iterator[Callable[[int], None]]:
        yield lambda _: self.counts.add(self.new_parameters())

    def new_parameters(self) -> int:
        known = {id(parameter) for parameter in self.before}
        return sum(parameter.numel() for parameter in live_parameters() if id(parameter) not in known)


def test_no_weight_of_a_served_teacher_is_in_the_process(
    fake: FakeServer, prompts: Path, student: Path, teacher: Path, tmp_path: Path
) -> None:
    sizes = [sum(w.numel() for w in load_file(path / "model.safetensors").values()) for path in (student, teacher)]
    served, loaded = ParameterObserver(), ParameterObserver()
    train_served(prompts, str(student), fake.url, None, tmp_path / "served", ONLINE, 0, served)
    assert served.counts == {sizes[0]}
    config = replace(ONLINE, online=OnlineConfig(sampling=SAMPLING))
    train_online(prompts, str(student), str(teacher), tmp_path / "loaded", config, 0, loaded)
    assert loaded.counts == {sum(sizes)}


def test_a_stopped_run_continues_to_the_same_weights(
    fake: FakeServer, prompts: Path, student: Path, tmp_path: Path, contents: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(ONLINE, batch_size=4, save_steps=1)
    whole = train_served(prompts, str(student), fake.url, None, tmp_path / "whole", config)
    with monkeypatch.context() as patches:
        cut(patches, step=1)
        with pytest.raises(RuntimeError, match="cut"):
            train_served(prompts, str(student), fake.url, None, tmp_path / "stopped", config)
    fake.url = fake.url.replace("127.0.0.1", "localhost")  # the address is no part of the identity
    train_served(prompts, str(student), fake.url, None, tmp_path / "stopped", config)
    assert contents(tmp_path / "stopped") == contents(whole.path)


def test_another_teacher_stops_the_run(
    fake: FakeServer, prompts: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_sampler = stage.open_sampler

    def exchange(*given: object) -> object:
        fake.log_probs = random_model(258)
        return open_sampler(*given)

    monkeypatch.setattr(stage, "open_sampler", exchange)
    with pytest.raises(TsdkdError, match="as another teacher"):
        train_served(prompts, str(student), fake.url, None, tmp_path / "served", ONLINE)


@pytest.mark.parametrize(("names", "owner"), [([""], "the teacher"), (["code", "math"], "the teacher code")])
def test_too_little_captured_mass_stops_the_run(
    fake: FakeServer, tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], owner: str
) -> None:
    monkeypatch.setattr(served_scoring, "MIN_CAPTURED_MASS", 0.99)
    rows = [{"prompt": f"{i} and {i}?", "source": names[i % len(names)] or "one"} for i in range(10)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampling = replace(SAMPLING, teacher_by="source" if len(names) > 1 else None)
    config = replace(ONLINE, online=OnlineConfig(sampling=sampling, teacher_top_k=20))
    with pytest.raises(TsdkdError, match=f"The 20 most likely tokens of {owner} hold only") as error:
        train_served(prompts, str(student), dict.fromkeys(names, fake.url), None, tmp_path / "served", config)
    assert error.value.remedy.endswith("give a larger --teacher-top-k.")


@pytest.mark.parametrize("refused", [{"objective": TSDKDConfig(k=4, temperature=2.0)}, {"compile": True}])
def test_objectives_that_need_more_than_a_server_gives_are_refused(
    fake: FakeServer, prompts: Path, student: Path, tmp_path: Path, refused: dict[str, object]
) -> None:
    with pytest.raises(InputError, match="load the teacher with --teacher"):
        train_served(prompts, str(student), fake.url, None, tmp_path / "served", replace(ONLINE, **refused))
    assert not (tmp_path / "served").exists()


def test_the_top_k_of_a_loaded_teacher_is_refused(prompts: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Give --teacher-url"):
        train_online(prompts, str(student), str(teacher), tmp_path / "c", ONLINE)
