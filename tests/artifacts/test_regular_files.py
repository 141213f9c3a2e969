"""Every option that names a file or directory refuses a FIFO, a socket, a device, a directory and a huge file."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.artifacts import NEW, text_of, write
from tests.helpers.commands import refuse
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tests.helpers.runs import make_run
from tsdkd.artifacts.disk import replace_text
from tsdkd.artifacts.files import JOURNAL_FILE, LOCK_FILE, MANIFEST_FILE
from tsdkd.artifacts.locks import is_locked

KINDS = ("FIFO", "socket", "device", "directory", "missing")


@pytest.fixture(params=KINDS)
def special(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    path = Path("special.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        if request.param == "FIFO":
            os.mkfifo(path)
        elif request.param == "socket":
            server.bind(str(path))
        elif request.param == "device":
            path.symlink_to("/dev/zero")
        elif request.param == "directory":
            path.mkdir()
        yield path


def test_a_file_option(special: Path, student: Path) -> None:
    at = ["--student", student, "--run", "run", "--max-new-tokens", 2]
    good = write_prompts(Path("good.jsonl"), 1)
    cause, _ = refuse("generate", *at, "--prompts", special)
    assert str(special) in cause
    cause, _ = refuse("generate", *at, "--prompts", good, "--config", special)
    assert str(special) in cause
    cause, _ = refuse("plan", special)
    assert str(special) in cause
    assert not Path("run").exists()


@pytest.mark.parametrize(
    "file", ["chat_template.jinja", "generation_config.json", "tokenizer.json", "model.safetensors"]
)
def test_a_file_of_a_model(file: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", seed=1)
    (model / file).unlink(missing_ok=True)
    os.mkfifo(model / file)
    prompts = write_prompts(tmp_path / "p.jsonl", 1)
    cause, _ = refuse("generate", "--student", model, "--prompts", prompts, "--run", tmp_path / "run")
    assert cause == f"{model / file} is a FIFO, not a regular file."


def make_huge(path: Path) -> Path:
    """A file of zeros that takes no space; hashing it would take an hour."""
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, 1 << 40)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_huge_file_of_prompts(suffix: str, student: Path, tmp_path: Path) -> None:
    prompts = make_huge(tmp_path / f"p{suffix}")
    cause, _ = refuse("generate", "--student", student, "--prompts", prompts, "--run", tmp_path / "run")
    assert str(prompts) in cause


def test_a_huge_file_of_options_and_a_huge_plan(tmp_path: Path) -> None:
    huge = make_huge(tmp_path / "huge")
    assert refuse("plan", huge)[0] == f"The plan {huge} has more than 16,777,216 bytes."
    assert refuse("train", "--config", huge)[0].startswith(f"The file of options {huge} has more than")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_huge_file_of_a_model(file: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", seed=1)
    make_huge(model / file)
    prompts = write_prompts(tmp_path / "p.jsonl", 1)
    cause, _ = refuse("generate", "--student", model, "--prompts", prompts, "--run", tmp_path / "run")
    assert cause.startswith(f"The model's file {model / file} has more than")


def test_a_file_of_a_dataset(tmp_path: Path, student: Path) -> None:
    data = tmp_path / "data"
    (data / "gsm8k").mkdir(parents=True)
    os.mkfifo(data / "gsm8k" / "train.jsonl")
    cause, _ = refuse("generate", "--student", student, "--prompts", data, "--run", tmp_path / "run")
    assert "train.jsonl is a FIFO" in cause
    measured = ["--model", f"m={student}", "--tasks", "gsm8k", "--data", data, "--results", tmp_path / "r"]
    assert "train.jsonl is a FIFO" in refuse("eval", *measured)[0]


def test_a_file_of_an_artifact(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "rollouts" / JOURNAL_FILE).unlink(missing_ok=True)
    os.mkfifo(run / "rollouts" / JOURNAL_FILE)
    (run / "scores" / MANIFEST_FILE).unlink()
    os.mkfifo(run / "scores" / MANIFEST_FILE)
    assert "manifest.json cannot be read (not a regular file)" in refuse("artifact", "show", run / "scores")[0]
    assert "Found no scores" in refuse("train", "--run", run, "--checkpoint", tmp_path / "c")[0]


SPECIAL = pytest.mark.parametrize("special", [os.mkfifo, lambda path: path.symlink_to(path.parents[1] / "other")])


@SPECIAL
def test_a_lock_that_is_no_file(special: Callable[[Path], None], tmp_path: Path) -> None:
    """A writer makes its own, and a reader does not wait."""
    write(tmp_path / "a")
    lock = tmp_path / "a" / LOCK_FILE
    lock.unlink()
    special(lock)
    assert not is_locked(tmp_path / "a")
    write(tmp_path / "a", NEW, "new", overwrite=True)
    assert text_of(tmp_path / "a") == "new"
    assert not (tmp_path / "other").exists()


@SPECIAL
def test_a_temporary_file_that_is_no_file(special: Callable[[Path], None], tmp_path: Path) -> None:
    page = tmp_path / "pages" / "page.html"
    page.parent.mkdir()
    special(page.with_name("page.html.tmp"))
    replace_text(page, "new")
    assert page.read_text() == "new"
    assert [*page.parent.iterdir()] == [page]
    assert not (tmp_path / "other").exists()
