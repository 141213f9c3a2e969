"""Stages that are killed at a system call and run again end with the bytes of a run that nothing interrupted."""

import signal
from collections.abc import Iterable

import pytest

from benchmarks.robustness.kill_cases import CASES
from benchmarks.robustness.kills import Campaign, Trial
from benchmarks.robustness.preload import preload
from benchmarks.robustness.system_calls import SUPPORTED, Call, Kill
from benchmarks.robustness.trees import output_state
from tsdkd.artifacts.files import LOCK_FILE
from tsdkd.artifacts.journal import read_sessions

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="system calls are traced on Linux on x86-64 only")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    preload()
    campaign = Campaign(tmp_path_factory.mktemp("campaign"), [])
    campaign.prepare()
    return campaign


def kill(campaign: Campaign, case: str, path: str, *, by: int = signal.SIGKILL) -> list[str]:
    """Kill a case when it has opened `path` for writing, run it again, and return its faults."""
    return kill_at(campaign, case, next(number for number, call in calls_of(campaign, case) if call.path == path), by)


def calls_of(campaign: Campaign, case: str) -> Iterable[tuple[int, Call]]:
    return enumerate(campaign.expected(CASES[case]).calls, 1)


def kill_at(campaign: Campaign, case: str, call: int, by: int = signal.SIGKILL) -> list[str]:
    """Kill a case after a call, run it again, and return its faults."""
    record = campaign.run_trial(Trial(f"{case}-{call}-{by}", CASES[case], (Kill(call + 1, signal=by),)))
    assert len(record["kills"]) == 1
    assert record["between"] == ["older" if CASES[case].older else "partial"]
    return record["faults"]


@pytest.mark.parametrize(
    ("case", "path"),
    [
        ("generate, student", "out/part-00001.parquet.tmp"),
        ("score, hidden, over an older one", ".out.tsdkd-new/part-00001.parquet.tmp"),
        ("train", "out/resume/checkpoint-2/optimizer.pt"),
        ("train, over an older one", ".out.tsdkd-new/model.safetensors.tmp"),
        ("prune, over an older one", ".out.tsdkd-new/model.safetensors.tmp"),
    ],
)
def test_kill_9(campaign: Campaign, case: str, path: str) -> None:
    assert kill(campaign, case, path) == []
    assert [session.exit for session in read_sessions(campaign.work / "out")] == ["", "finished"]


@pytest.mark.parametrize(
    ("case", "path"),
    [("generate, student", "out/part-00001.parquet.tmp"), ("train", "out/resume/checkpoint-1/optimizer.pt")],
)
def test_ctrl_c(campaign: Campaign, case: str, path: str) -> None:
    assert kill(campaign, case, path, by=signal.SIGINT) == []
    assert [session.exit for session in read_sessions(campaign.work / "out")] == ["interrupted", "finished"]


def test_kill_9_while_safetensors_writes_a_file_of_its_own_name(campaign: Campaign) -> None:
    calls = calls_of(campaign, "score, hidden")
    reserved = next(number for number, call in calls if call.name == "ftruncate" and not call.path.endswith(LOCK_FILE))
    assert kill_at(campaign, "score, hidden", reserved) == []


def test_kill_9_between_two_benchmarks(campaign: Campaign) -> None:
    """The complete benchmark is not run again."""
    case = CASES["eval"]
    calls, work = campaign.expected(case).calls, campaign.start(case)
    first = next(number for number, call in enumerate(calls, 1) if "sciq" in call.path)
    assert campaign.run(case.command, work, Kill(first)).status == -signal.SIGKILL
    assert '"state": "partial"' in (work / "out" / "m" / "manifest.json").read_text()
    before = (work / "out" / "m" / "gsm8k.parquet").stat().st_mtime_ns
    assert campaign.run(case.command, work).status == 0
    assert (work / "out" / "m" / "gsm8k.parquet").stat().st_mtime_ns == before
    assert campaign.faults(case, work) == []


def test_every_difference_from_an_uninterrupted_run_is_a_fault(campaign: Campaign) -> None:
    case = CASES["score, hidden, over an older one"]
    expected, work = campaign.expected(case), campaign.start(case)
    (work / "out" / "part.tmp").touch()
    (work / "prompts.jsonl").unlink()
    left, missing, differs = campaign.faults(case, work)
    assert (left, missing) == ("left: out/part.tmp", "missing: prompts.jsonl")
    assert "out/manifest.json" in differs
    assert output_state(work, "out", expected.older, expected.newer) == "older"
    (work / "out" / "part-00000.parquet").write_bytes(b"")
    assert output_state(work, "out", expected.older, expected.newer).startswith("neither")
