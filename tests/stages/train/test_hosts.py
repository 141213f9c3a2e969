"""Ranks on several hosts: their inputs are compared, a failure ends all of them, and all see the directory."""

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.artifacts import OLD
from tsdkd.artifacts.files import LOCK_FILE
from tsdkd.artifacts.locks import Holder
from tsdkd.errors import InputError, OtherRankError
from tsdkd.stages.train import hosts, loop, resume
from tsdkd.stages.train.hosts import agree_on_directory, failing_together, require_same_inputs
from tsdkd.stages.train.loop import _removed_unless_saved
from tsdkd.stages.train.resume import STATE_FILE

Two = Callable[..., list[Any]]


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Two:
    """Make this process a rank of two. Returns what it has sent; the other rank sends `other`."""

    def join(rank: int, other: Any) -> list[Any]:
        sent: list[Any] = []

        def gather(own: list[Any]) -> list[Any]:
            sent.extend(own)
            return [*own, other] if rank == 0 else [other, *own]

        for name, fake in {
            "rank": lambda: rank,
            "world_size": lambda: 2,
            "gather_object": gather,
            "broadcast_object_list": lambda own: own if rank == 0 else [other],
            "PartialState": lambda **_: None,
            "ATTEMPTS": 2,
            "PAUSE": 0,
        }.items():
            monkeypatch.setattr(hosts, name, fake)
        return sent

    return join


def report(rank: int, manifest: Any = OLD) -> Any:
    return hosts._Report(rank, f"gpu{rank + 1}", manifest)


def test_ranks_with_equal_inputs_train(two: Two) -> None:
    two(0, report(1))
    with failing_together():
        require_same_inputs(OLD)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (replace(OLD, config={"tasks": "b"}), "config.tasks was a, now b"),
        (replace(OLD, libraries={"torch": "1"}), "versions were"),
    ],
)
def test_ranks_with_other_inputs_are_refused(two: Two, other: Any, difference: str) -> None:
    two(0, report(1, other))
    with failing_together(), pytest.raises(InputError, match="Rank 1 on gpu2 differs from rank 0 on") as refused:
        require_same_inputs(OLD)
    assert difference in refused.value.cause
    two(1, report(0, other))
    with failing_together(), pytest.raises(OtherRankError):
        require_same_inputs(OLD)


def test_a_rank_that_fails_tells_the_others(two: Two) -> None:
    sent = two(1, report(0))
    with pytest.raises(InputError) as raised, failing_together():
        raise InputError("no such file", "Look.")
    assert raised.value.cause == f"On {socket.gethostname()}: no such file"
    assert sent[0].manifest is None
    two(0, report(1, None))
    with failing_together(), pytest.raises(OtherRankError):
        require_same_inputs(OLD)


def test_an_error_of_all_ranks_is_raised_by_the_first(two: Two) -> None:
    two(1, report(0, None))
    with pytest.raises(OtherRankError), failing_together():
        raise InputError("no such file", "Look.")


def test_a_failure_after_the_comparison_does_not_wait_for_others(two: Two) -> None:
    sent = two(0, report(1))

    @failing_together()
    def train() -> None:
        require_same_inputs(OLD)
        raise RuntimeError("later")

    with pytest.raises(RuntimeError, match="later"):
        train()
    assert len(sent) == 1


def test_ranks_that_do_not_see_the_directory_are_refused(two: Two, tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text(str(Holder.own()))
    two(0, ("gpu2", True))
    assert agree_on_directory(tmp_path) == tmp_path
    two(0, ("gpu2", False))
    with pytest.raises(InputError, match=f"gpu2 cannot read and write {tmp_path}, which"):
        agree_on_directory(tmp_path)
    two(1, (tmp_path, "the lock of a process that this host does not see"))
    with pytest.raises(OtherRankError):
        agree_on_directory(None)
    two(1, None)  # rank 0 has failed
    with pytest.raises(OtherRankError):
        agree_on_directory(None)


def test_a_directory_that_a_host_sees_late_is_waited_for(
    two: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two(1, (tmp_path, "the lock"))
    texts = iter(["", "the lock"])
    monkeypatch.setattr(hosts, "_lock_text", lambda _: next(texts))
    assert agree_on_directory(None) == tmp_path


def test_a_host_that_may_only_read_the_directory_is_refused_before_the_first_step(
    two: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LOCK_FILE).write_text(str(Holder.own()))
    monkeypatch.setattr(hosts.os, "access", lambda *_: False)  # as for a read-only mount
    two(0, ("gpu2", True))
    with pytest.raises(InputError, match=f"{socket.gethostname()} cannot read and write {tmp_path}, which"):
        agree_on_directory(tmp_path)
    (tmp_path / LOCK_FILE).unlink()  # a complete artifact, for which rank 0 has no lock
    assert agree_on_directory(tmp_path) == tmp_path


@pytest.mark.parametrize("here", [False, True])
def test_saved_steps_are_not_deleted_by_a_host_that_may_not_see_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    monkeypatch.setattr(loop, "rank", lambda: 1)
    (tmp_path / LOCK_FILE).write_text(str(Holder.own() if here else Holder(7, "boot", "gpu1")))
    (tmp_path / "resume").mkdir()
    with pytest.raises(RuntimeError), _removed_unless_saved(tmp_path / "resume"):
        raise RuntimeError
    assert (tmp_path / "resume").exists() is not here


def test_files_that_one_host_alone_sees_are_part_of_a_saved_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tmp_path / "checkpoint-1"
    step.mkdir()
    for name in ("a", "b"):
        (step / name).write_text(name)
    monkeypatch.setattr(resume, "world_size", lambda: 2)
    monkeypatch.setattr(resume, "PartialState", type("", (), {"wait_for_everyone": lambda _: None}))
    monkeypatch.setattr(resume, "_files", lambda _: ["b"])
    monkeypatch.setattr(
        resume, "gather_object", lambda own: [*own, "a"] if own == ["b"] else [*own, {"b": [1, "hash"]}]
    )
    marked: list[dict[str, Any]] = []
    monkeypatch.setattr(resume, "_write_mark", lambda _, files, __: marked.append(files))
    monkeypatch.setattr(resume, "_delete_old_steps", lambda *_: None)
    state = type("", (), {"global_step": 1, "is_world_process_zero": True, "best_global_step": None})
    resume.StateCallback({}).on_save(type("", (), {"output_dir": str(tmp_path)}), state, None)  # type: ignore[arg-type]
    assert sorted(marked[0]) == ["a", "b"]
    assert not (step / STATE_FILE).exists()
