"""Every mistake a user can make: one line of cause, one of remedy, exit code, nothing written, nothing lost."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tests.helpers.commands import refuse
from tests.helpers.disk import files_of_at_most
from tests.helpers.prompts import write_prompts
from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.writer import TableWriter, Writer
from tsdkd.cli import app

Contents = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module")
def chain(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run directory, made through the command line."""
    directory = tmp_path_factory.mktemp("chain")
    prompts = write_prompts(directory / "prompts.jsonl", 6)
    run = str(directory / "run")
    for command in (
        ["generate", "--student", str(student), "--prompts", str(prompts), "--max-new-tokens", "6", "--part-size", "3"],
        ["score", "--teacher", str(teacher), "--k", "4"],
        ["train", "--k", "4", "--batch-size", "3", "--epochs", "1", "--precision", "float32"],
    ):
        result = CliRunner().invoke(app, [*command, "--run", run])
        assert result.exit_code == 0, result.output
    return directory


@pytest.fixture
def directory(chain: Path, tmp_path: Path) -> Path:
    """A copy of the run to break."""
    shutil.copytree(chain, tmp_path / "chain")
    return tmp_path / "chain"


def generate_with(student: Path, run: Path, *more: object) -> list[object]:
    return ["generate", "--student", student, "--run", run, "--max-new-tokens", "6", "--part-size", "3", *more]


@pytest.mark.parametrize(
    ("name", "text", "more", "cause"),
    [
        ("p.jsonl", None, [], "does not exist"),
        ("p.jsonl", "", [], "holds no prompts"),
        ("p.jsonl", '{"question": "a", "level": 2}\n', [], "has no column 'messages' or 'prompt'"),
        ("p.jsonl", '{"prompt": "a"}\n', ["--column", "text"], "has no column 'text'"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', [], "line 2: not JSON"),
    ],
)
def test_prompts(student: Path, tmp_path: Path, name: str, text: str | None, more: list[str], cause: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    message, remedy = refuse(*generate_with(student, tmp_path / "run", "--prompts", tmp_path / name, *more))
    assert cause in message
    if "column" in cause:
        assert remedy.endswith("one of: question, level." if "question" in str(text) else "one of: prompt.")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command",
    [["generate", "--student", "LOOP"], ["inspect", "--run", "LOOP"], ["artifact", "show", "LOOP"]],
    ids=lambda command: command[0],
)
def test_a_link_to_itself(command: list[str], tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    cause, remedy = refuse(*(loop if word == "LOOP" else word for word in command), code=1)
    assert str(loop) in cause
    assert "link" in cause
    assert "--debug" not in remedy


def test_a_path_that_is_no_model(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, cause in ((tmp_path / "none", "The model directory"), (tmp_path / "empty", "is not a model directory")):
        message, _ = refuse(*generate_with(name, tmp_path / "run", "--prompts", chain / "prompts.jsonl"))
        assert cause in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["generate", "score", "train", "eval", "prune", "inspect"])
def test_an_unknown_attention_is_refused(command: str, directory: Path, teacher: Path) -> None:
    """Every command that loads a model has the option, and refuses an unknown name before it writes."""
    inputs: dict[str, list[object]] = {
        "generate": ["--student", teacher, "--prompts", directory / "prompts.jsonl", "--rollouts", directory / "new"],
        "score": ["--teacher", teacher, "--scores", directory / "new"],
        "train": ["--checkpoint", directory / "new"],
        "eval": ["--model", f"m={teacher}", "--held-out", directory / "run", "--results", directory / "new"],
        "prune": ["--teacher", teacher, "--prompts", directory / "prompts.jsonl", "--output", directory / "new"],
        "inspect": ["--teacher", teacher],
    }
    run = [] if command == "prune" else ["--run", directory / "run"]
    cause, remedy = refuse(command, *inputs[command], *run, "--attention", "nothing")
    assert cause == "--attention nothing is unknown."
    assert remedy.startswith("Choose from eager,")
    assert not (directory / "new").exists()


def test_models_with_different_tokenizers(directory: Path, other_family: Path) -> None:
    shutil.rmtree(directory / "run" / "scores")
    found, remedy = refuse("score", "--run", directory / "run", "--teacher", other_family)
    assert "different tokenizers: 1 ids differ, first 258 (None against '<|tool|>')" in found
    assert "save the student's tokenizer" in remedy
    assert not (directory / "run" / "scores").exists()


def test_the_wrong_kind(directory: Path) -> None:
    cause, remedy = refuse("score", "--rollouts", directory / "run" / "scores", "--scores", directory / "s", "--k", 4)
    assert "holds scores, not rollouts" in cause
    assert "`tsdkd generate`" in remedy


def test_a_newer_format(directory: Path) -> None:
    manifest = directory / "run" / "rollouts" / MANIFEST_FILE
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 9}))
    cause, remedy = refuse("score", "--run", directory / "run")
    assert "has format 9" in cause
    assert remedy == "Update tsdkd."


@pytest.mark.parametrize("kind", ["rollouts", "scores"])
def test_a_changed_or_missing_part(directory: Path, kind: str) -> None:
    part = directory / "run" / kind / "part-00001.parquet"
    pq.write_table(pq.read_table(part).slice(1), part)
    shutil.rmtree(directory / "run" / "checkpoint")
    cause, _ = refuse("train", "--run", directory / "run", "--k", 4)
    assert "has a hash that differs from the manifest" in cause
    part.unlink()
    cause, remedy = refuse("train", "--run", directory / "run", "--k", 4)
    assert "part-00001.parquet is missing" in cause
    assert "Restore it" in remedy
    assert not (directory / "run" / "checkpoint").exists()


def test_foreign_parents(directory: Path, student: Path) -> None:
    other = write_prompts(directory / "other.jsonl", 3)
    assert (
        CliRunner().invoke(app, [str(w) for w in generate_with(student, directory / "b", "--prompts", other)]).exit_code
        == 0
    )
    cause, remedy = refuse(
        "train",
        "--rollouts",
        directory / "b" / "rollouts",
        "--scores",
        directory / "run" / "scores",
        "--checkpoint",
        directory / "c",
    )
    assert "made from other rollouts" in cause
    assert "--overwrite" in remedy
    assert not (directory / "c").exists()


def test_a_partial_parent(directory: Path) -> None:
    manifest = directory / "run" / "rollouts" / MANIFEST_FILE
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"state": "partial"}))
    cause, remedy = refuse("score", "--run", directory / "run")
    assert "is not finished: 2 parts" in cause
    assert "`tsdkd generate` again" in remedy


@pytest.mark.parametrize(("command", "kind"), [("score", "rollouts"), ("train", "scores"), ("eval", "checkpoint")])
def test_a_missing_input(tmp_path: Path, command: str, kind: str) -> None:
    cause, remedy = refuse(command, "--run", tmp_path / "run")
    assert f"Found no {kind} at" in cause
    assert "first" in remedy
    assert not (tmp_path / "run").exists()


def test_an_output_with_another_configuration(directory: Path, student: Path, contents: Contents) -> None:
    before = contents(directory / "run")
    again = generate_with(student, directory / "run", "--prompts", directory / "prompts.jsonl")
    assert CliRunner().invoke(app, [str(word) for word in again]).exit_code == 0  # the same: nothing to do
    cause, remedy = refuse(*again, "--temperature", "0.5")
    assert "--temperature was 1.0, now 0.5" in cause
    assert "--overwrite" in remedy
    assert contents(directory / "run") == before


def test_adapters_in_place_of_full_weights_are_named_by_the_option(directory: Path) -> None:
    at = ["--run", directory / "run", "--k", 4, "--batch-size", 3, "--epochs", 1, "--precision", "float32"]
    cause, _ = refuse("train", "--lora", *at)
    assert cause.endswith("was made with another configuration: --lora was off, now on.")
    cause, _ = refuse("train", "--lora", *at, "--learning-rate", "1e-3")
    assert cause.endswith(": --lora was off, now on; --learning-rate was 5e-06, now 0.001.")


def test_more_candidates_than_tokens(directory: Path) -> None:
    shutil.rmtree(directory / "run" / "scores")
    cause, _ = refuse("score", "--run", directory / "run", "--k", 258, "--teacher", directory / "nobody")
    assert "nobody does not exist" in cause
    teacher = json.loads((directory / "run" / "checkpoint" / MANIFEST_FILE).read_text())["models"][1]["name"]
    cause, remedy = refuse("score", "--run", directory / "run", "--k", 258, "--teacher", teacher)
    assert "--k is 258, but the vocabulary has only 258 tokens" in cause
    assert "smaller --k" in remedy
    assert not (directory / "run" / "scores").exists()


def test_an_unknown_task(directory: Path) -> None:
    cause, remedy = refuse("eval", "--run", directory / "run", "--tasks", "gsm8k,poetry")
    assert "'poetry' is not a benchmark" in cause
    assert "gsm8k, gsm8k:strict, gsm-plus" in remedy
    assert not (directory / "run" / "results").exists()


def test_missing_benchmark_data(directory: Path) -> None:
    cause, remedy = refuse("eval", "--run", directory / "run", "--tasks", "sciq", "--data", directory)
    assert f"sciq needs the directory {directory / 'sciq'}" in cause
    assert "--data" in remedy
    assert not (directory / "run" / "results").exists()


def test_programs_run_only_with_permission(directory: Path) -> None:
    cause, remedy = refuse("eval", "--run", directory / "run", "--tasks", "mbpp")
    assert "runs programs that the model wrote" in cause
    assert "--allow-code-execution" in remedy
    assert not (directory / "run" / "results").exists()


def test_a_missing_model_is_refused_before_another_is_measured(directory: Path, student: Path) -> None:
    models = ["--model", f"a={student}", "--model", f"b={directory / 'nobody'}", "--tasks", "embedded"]
    cause, _ = refuse("eval", "--run", directory / "run", *models)
    assert "nobody" in cause
    assert not (directory / "run" / "results").exists()


def test_nothing_to_compare(directory: Path) -> None:
    cause, remedy = refuse("eval", "--compare", directory / "run")
    assert f"Found no results at {directory / 'run'}" in cause
    assert "tsdkd eval" in remedy
    cause, remedy = refuse("eval", directory / "run")
    assert "--compare" in remedy


@pytest.mark.parametrize("word", ["distilled", "=x", "a/b=c"])
def test_a_model_without_a_name(directory: Path, word: str) -> None:
    cause, remedy = refuse("eval", "--run", directory / "run", "--model", word)
    assert word in cause
    assert "NAME=MODEL" in remedy


@pytest.mark.parametrize("more", [["--opener", "long"], ["--opener", "0"], ["--em-ratio", "2"], ["--tau", "0"]])
def test_objective_values(directory: Path, more: list[str]) -> None:
    refuse("train", "--run", directory / "run", *more)


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        (["--lora-rank", "8"], "Options of LoRA are given without --lora"),
        (["--merge"], "Options of LoRA are given without --lora"),
        (["--lora", "--lora-targets", "query"], "no linear modules query"),
        (["--max-new-tokens", "9"], "online training are given without it"),
        (["--lambda", "1.5"], "lambda is 1.5"),
        (["--lambda", "0.5"], "no recorded responses"),
        (["--lambda", "0", "--teacher-fraction", "0.5"], "--teacher-fraction needs sampled responses"),
        (["--held-out", "0.2"], "--held-out and --eval-steps belong together"),
        (["--tracker", "nothing"], "tracker"),
        (["--stop-on-degeneration", "--attention", "nothing"], "nothing"),
        (["--method", "gdk"], "Unknown method 'gdk'"),
        (["--method", "gkd", "--opener", "0.1"], "gkd has no --opener"),
        (["--method", "seqkd"], "does not learn from responses by student"),
        (["--method", "seqkd", "--scores", "elsewhere"], "seqkd needs no scores"),
        (["--method", "distillm"], "distillm needs online training"),
        (["--method", "minillm", "--teacher-fraction", "0.5"], "online training are given without it"),
        (["--method", "minillm", "--lambda", "0.5"], "minillm learns only from responses that are sampled"),
        (["--method", "minillm", "--lambda", "1", "--engine", "vllm"], "need the transformers engine"),
        (["--replay-capacity", "5"], "The method tsdkd replays no responses"),
        (["--released", "pace"], "released is"),
        (["--divergence", "skew-kl", "--skew", "1"], "skew is 1"),
    ],
)
def test_training_options(directory: Path, more: list[str], cause: str) -> None:
    names = (
        ["--prompts", directory / "prompts.jsonl", "--teacher", _name(directory, "teacher")]
        if "--lambda" in more
        else []
    )
    student = ["--student", _name(directory, "student")]
    message, _ = refuse("train", "--run", directory / "run", "--checkpoint", directory / "new", *student, *names, *more)
    assert cause in message
    assert not (directory / "new").exists()


def _name(directory: Path, role: str) -> str:
    return load_manifest(directory / "run" / "scores").model(role).name


def test_prompts_from_two_sources(directory: Path) -> None:
    both = ["--prompts", directory / "prompts.jsonl", "--rollouts", directory / "run" / "rollouts"]
    cause, _ = refuse("train", "--run", directory / "run", "--checkpoint", directory / "new", *both)
    assert "both given" in cause


def test_an_adapter_cannot_be_trained_further(directory: Path) -> None:
    shape = [
        "--k",
        "4",
        "--batch-size",
        "3",
        "--epochs",
        "1",
        "--precision",
        "float32",
        "--run",
        str(directory / "run"),
    ]
    done = CliRunner().invoke(app, ["train", "--lora", "--checkpoint", str(directory / "adapter"), *shape])
    assert done.exit_code == 0, done.output
    cause, remedy = refuse("train", "--student", directory / "adapter", "--checkpoint", directory / "new", *shape)
    assert "is an adapter" in cause
    assert "--merge" in remedy


def test_a_full_disk_keeps_complete_parts(
    directory: Path, student: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills while the second part is written; with free space, the same command completes it."""
    write, written = TableWriter.write, 0

    def on_a_full_disk(part: TableWriter, table: pa.Table) -> None:
        nonlocal written
        written += 1
        if written == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(part, table)

    command = generate_with(student, directory / "full", "--prompts", directory / "prompts.jsonl")
    monkeypatch.setattr(TableWriter, "write", on_a_full_disk)
    cause, remedy = refuse(*command, code=1)
    assert f"{directory / 'full' / 'rollouts'} could not be written (No space left on device); its disk has " in cause
    assert cause.endswith(" GB free.")
    assert "Free space or check the disk" in remedy
    monkeypatch.undo()
    assert CliRunner().invoke(app, [str(word) for word in command]).exit_code == 0
    assert contents(directory / "full" / "rollouts") == contents(directory / "run" / "rollouts")


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("rollouts", {"manifest": 700, "part": 2_000}),
        ("scores", {"config": 100, "part": 20_000, "teacher's head": 40_000}),
        (
            "checkpoint",
            {"journal": 700, "tokenizer": 4_000, "weights": 50_000, "optimizer": 150_000, "its end": 300_000},
        ),
    ],
)
def test_any_file_that_does_not_fit_is_named_and_the_run_resumes(
    directory: Path, student: Path, teacher: Path, contents: Contents, kind: str, sizes: dict[str, int]
) -> None:
    """Parquet, JSON, safetensors and torch files; each library has its own error for a disk that is full."""
    run = directory / "run"
    before = contents(run / kind)
    words = {
        "rollouts": generate_with(student, run, "--prompts", directory / "prompts.jsonl"),
        "scores": ["score", "--teacher", teacher, "--k", 4, "--run", run],
        "checkpoint": ["train", "--k", 4, "--batch-size", 3, "--epochs", 1, "--precision", "float32", "--run", run],
    }[kind]
    shutil.rmtree(run / kind)
    for size in sizes.values():
        with files_of_at_most(size):
            cause, remedy = refuse(*words, code=1)
        assert str(run / kind) in cause
        assert "could not be written (" in cause
        assert cause.endswith(" GB free.")
        assert f"limit of {size:,} bytes a file (`ulimit -f`)" in remedy
    assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
    assert contents(run / kind) == before


def test_a_page_that_does_not_fit_is_named(directory: Path) -> None:
    with files_of_at_most(100):
        cause, _ = refuse("report", directory / "run", code=1)
    assert f"{directory / 'run' / 'report.html'} could not be written (File too large)" in cause


def test_a_read_only_disk(directory: Path, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    cause, remedy = refuse(*generate_with(student, directory / "ro", "--prompts", directory / "prompts.jsonl"), code=1)
    assert "Read-only file system" in cause
    assert "another directory" in remedy


@pytest.mark.parametrize(
    ("more", "cause", "remedy"),
    [
        (["--sample-id", "nobody"], "has no response nobody", "Name another, such as "),
        (["--k", "9"], "--k is 9, but only 4 candidates", "Lower --k"),
        (["--opener", "long"], "--opener is 'long'", "adaptive"),
        (["--em-ratio", "0"], "em_ratio is 0", "(0, 1]"),
        (["--positions", "7-3"], "--positions is '7-3'", "such as 1-40"),
        (["--positions", "70-80"], "The response has ", "within them"),
        (["--html", "nowhere/page.html"], "directory nowhere of the page does not exist", "Create it"),
        (["--teacher", "t", "--scores", "s"], "--teacher and --scores are both given", "one of them"),
        (["--aggregate", "--after", "m"], "all responses of the scores", "--after, --student"),
        (["--checkpoint", "nowhere"], "Found no checkpoint at nowhere", "--checkpoint"),
        (["--rollouts", "nowhere"], "Found no rollouts at nowhere", "--rollouts"),
        (["--student", "nowhere"], "directory nowhere does not exist", "hub id"),
        (["--after", "nowhere"], "directory nowhere does not exist", "hub id"),
    ],
)
def test_options_that_inspect_refuses(directory: Path, more: list[str], cause: str, remedy: str) -> None:
    message, found_remedy = refuse("inspect", "--run", directory / "run", *more)
    assert cause in message
    assert remedy in found_remedy


def test_inspect_needs_complete_scores_and_their_rollouts(directory: Path) -> None:
    run = directory / "run"
    (run / "rollouts").rename(directory / "moved")
    cause, remedy = refuse("inspect", "--run", run)
    assert "Found no rollouts at" in cause
    assert "--rollouts" in remedy
    assert (
        CliRunner().invoke(app, ["inspect", "--run", str(run), "--rollouts", str(directory / "moved")]).exit_code == 0
    )
    manifest = run / "scores" / MANIFEST_FILE
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"state": "partial"}))
    cause, remedy = refuse("inspect", "--run", run, "--aggregate")
    assert "is not finished" in cause
    assert "`tsdkd score` again" in remedy


STAGES = {
    "generate": ["generate", "--prompts", "prompts.jsonl", "--max-new-tokens", "6", "--part-size", "3"],
    "score": ["score", "--k", "4"],
    "train": ["train", "--k", "4", "--batch-size", "3", "--epochs", "1", "--precision", "float32"],
    "eval": ["eval", "--limit", "3", "--tasks", "embedded"],
    "prune": ["prune", "--prompts", "prompts.jsonl", "--output", "run/pruned", "--limit", "2"],
}
ARTIFACTS = {
    "generate": "rollouts",
    "score": "scores",
    "train": "checkpoint",
    "eval": "results/teacher",
    "prune": "pruned",
}


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_in_the_middle(
    directory: Path, student: Path, teacher: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Interrupted at its second part (or file), each stage exits 130 and ends, run again, with the same bytes."""
    names = {"generate": ["--student", student], "score": ["--teacher", teacher], "prune": ["--teacher", teacher]}
    command = [str(word) for word in [*STAGES[stage], *names.get(stage, [])]]
    command += [] if stage == "prune" else ["--run", "run"]
    monkeypatch.chdir(directory)
    written = directory / "run" / ARTIFACTS[stage]
    shutil.rmtree(written, ignore_errors=True)
    assert CliRunner().invoke(app, command).exit_code == 0
    before = contents(written)
    shutil.rmtree(written)
    add, added = Writer.add_file, 0

    def interrupted(self: Writer, *args: object) -> None:
        nonlocal added
        added += 1
        if added == 2:
            raise KeyboardInterrupt
        add(self, *args)

    monkeypatch.setattr(Writer, "add_file", interrupted)
    cause, remedy = refuse(*command, code=130)
    assert "Interrupted" in cause
    assert "same command" in remedy
    monkeypatch.undo()
    monkeypatch.chdir(directory)
    assert json.loads((written / MANIFEST_FILE).read_text())["state"] == "partial"
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert contents(written) == before


def test_an_unexpected_failure_is_one_line_and_debug_shows_a_traceback(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("inner workings\nand more")

    monkeypatch.setattr("tsdkd.artifacts.manifest.load_manifest", fail)
    cause, remedy = refuse("artifact", "show", directory, code=1)
    assert cause == "RuntimeError: inner workings"
    assert "--debug" in remedy
    shown = CliRunner().invoke(app, ["--debug", "artifact", "show", str(directory)])
    assert isinstance(shown.exception, RuntimeError)


@pytest.mark.parametrize(
    ("command", "cause", "help_of"),
    [
        (["generate", f"--{'x' * 200}"], f"No such option: --{'x' * 200}", "tsdkd generate --help"),
        (["score", "--k", "ten"], "Invalid value for '--k'", "tsdkd score --help"),
        (["score", "--k"], "Option '--k' requires an argument", "tsdkd score --help"),
        (["artifact", "show"], "Missing argument 'DIR'", "tsdkd artifact show --help"),
        (["distil"], "No such command 'distil'", "tsdkd --help"),
    ],
)
def test_a_wrong_option_is_a_line_of_cause_and_one_of_remedy(command: list[str], cause: str, help_of: str) -> None:
    found, remedy = refuse(*command)
    assert cause in found
    assert remedy == f"`{help_of}` lists the options."


def test_a_student_that_does_not_respond_is_refused(tmp_path: Path) -> None:
    """It would be neither read nor recorded, whether it exists or not; `plan` refuses the same line."""
    words = ("generate", "--run", tmp_path / "run", "--policy", "teacher", "--student", "missing")
    cause, remedy = refuse(*words)
    assert cause == "The policy 'teacher' does not use the student missing."
    assert remedy.startswith("Leave out --student")
    (tmp_path / "plan").write_text(" ".join(map(str, ("tsdkd", *words))) + "\n")
    assert refuse("plan", tmp_path / "plan")[0].endswith(cause)
    assert not (tmp_path / "run").exists()
