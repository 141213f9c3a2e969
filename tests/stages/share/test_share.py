"""An artifact is pushed and pulled as it is; nothing unfinished, changed or hostile is taken for it."""

import hashlib
import json
import os
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import fsspec
import pytest

from tests.helpers.artifacts import RESULTS, add, write_parts
from tests.helpers.commands import refuse, run
from tests.helpers.deaths import die_at, killed
from tests.helpers.runs import make_run
from tsdkd.artifacts.files import JOURNAL_FILE, LOCK_FILE, MANIFEST_FILE
from tsdkd.artifacts.hashing import json_digest
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.reader import read_artifact
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import ArtifactError, InputError, TsdkdError
from tsdkd.stages.share import store as store_module
from tsdkd.stages.share.stage import pull, push
from tsdkd.stages.share.store import Store, block_of, stored_checksum_is
from tsdkd.stages.share.transfer import Transfer

Contents = Callable[[Path], dict[str, bytes]]
PARTS = ["more/last.txt", "part-0.bin", "part-1.bin", "part-2.bin", "part-3.bin"]


@pytest.fixture(autouse=True)
def empty_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_parts(tmp_path / "artifact").path


@pytest.fixture
def there(tmp_path: Path, artifact: Path) -> Path:
    """A directory that the artifact was pushed to."""
    push(artifact, f"file://{tmp_path}/there")
    return tmp_path / "there"


@pytest.fixture
def sent() -> Iterator[list[str]]:
    """The names of the files that are written at a store, in their order."""
    names: list[str] = []
    writing = Store._writing
    with patch.object(Store, "_writing", lambda self, name, size: names.append(name) or writing(self, name, size)):
        yield names


def url(path: Path) -> str:
    return f"file://{path}"


def change_manifest(there: Path, **more: object) -> None:
    """A hostile manifest is consistent with its own hash."""
    content = json.loads((there / MANIFEST_FILE).read_text()) | more
    del content["sha256"]
    (there / MANIFEST_FILE).write_text(json.dumps(content | {"sha256": json_digest(content)}))


def parts_of(there: Path) -> list[dict[str, object]]:
    parts: list[dict[str, object]] = json.loads((there / MANIFEST_FILE).read_text())["parts"]
    return parts


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_pulled_artifact_has_the_bytes_of_the_pushed_one(
    tmp_path: Path, artifact: Path, contents: Contents, scheme: str
) -> None:
    store = f"{scheme}://{tmp_path}/there"
    run("artifact", "push", artifact, store)
    shown = run("artifact", "pull", store, tmp_path / "back")
    assert load_manifest(artifact).fingerprint[:12] in shown
    assert contents(tmp_path / "back") == contents(artifact)
    run("artifact", "verify", tmp_path / "back")


def test_neither_journal_nor_lock_nor_config_is_sent(artifact: Path, there: Path) -> None:
    for name in (JOURNAL_FILE, "config.yaml"):
        (artifact / name).write_text("private")
    push(artifact, url(there))
    assert sorted(str(f.relative_to(there)) for f in there.rglob("*") if f.is_file()) == [MANIFEST_FILE, *PARTS]
    assert (artifact / LOCK_FILE).exists()


def test_rollouts_and_scores_of_a_run_keep_their_lineage(tmp_path: Path) -> None:
    before = make_run(tmp_path / "before")
    for kind in ("rollouts", "scores"):
        push(before / kind, f"memory://run/{kind}")
        pull(f"memory://run/{kind}", tmp_path / "after" / kind)
    pulled = {kind: read_artifact(tmp_path / "after" / kind, kind) for kind in ("rollouts", "scores")}
    pulled["scores"].require_parent(pulled["rollouts"])
    lineage = run("artifact", "lineage", tmp_path / "after" / "scores").splitlines()[1]
    assert lineage.endswith(f"{tmp_path}/after/rollouts")
    assert "missing" not in lineage
    assert "changed" not in lineage


def test_a_complete_push_and_a_complete_pull_do_nothing(
    tmp_path: Path, artifact: Path, there: Path, sent: list[str], contents: Contents
) -> None:
    assert push(artifact, url(there)) == url(there)
    assert sent == []
    pull(url(there), tmp_path / "back")
    (there / "part-0.bin").write_bytes(bytes([9]) * 3000)  # is not read again
    before = (tmp_path / "back").stat().st_mtime_ns
    pull(url(there), tmp_path / "back", overwrite=True)
    assert (tmp_path / "back").stat().st_mtime_ns == before
    assert contents(tmp_path / "back") == contents(artifact)


def test_a_push_sends_missing_changed_and_truncated_parts_and_the_manifest_last(
    artifact: Path, there: Path, sent: list[str], contents: Contents
) -> None:
    (there / "part-0.bin").unlink()
    (there / "part-1.bin").write_bytes((there / "part-1.bin").read_bytes()[:-1])
    (there / "part-2.bin").write_bytes(bytes(3002))
    push(artifact, url(there))
    assert sorted(sent[:-1]) == ["part-0.bin", "part-1.bin", "part-2.bin"]
    assert sent[-1] == MANIFEST_FILE
    assert contents(there) == contents(artifact)


def test_a_push_without_its_manifest_is_unfinished(tmp_path: Path, there: Path) -> None:
    (there / MANIFEST_FILE).unlink()
    cause, remedy = refuse("artifact", "pull", url(there), tmp_path / "back")
    assert cause == f"{url(there)} holds no finished artifact: it has no manifest.json."
    assert "push" in remedy
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "at",
    [("_count", 1), ("_count", 4), ("_count", 5), ("read_manifest", 1)],
    ids=lambda at: f"{at[0]}-{at[1]}",
)
def test_a_killed_push_is_completed_by_the_same_command(
    tmp_path: Path, artifact: Path, sent: list[str], contents: Contents, at: tuple[str, int]
) -> None:
    there = tmp_path / "there"
    killed(lambda: push(artifact, url(there)), die_at(Transfer if at[0] == "_count" else Store, *at))
    if at[0] == "_count":
        with pytest.raises(ArtifactError, match="no finished artifact"):
            pull(url(there), tmp_path / "back")
    there_before = {name for name, data in contents(there).items() if contents(artifact)[name] == data}
    push(artifact, url(there))
    assert contents(there) == contents(artifact)
    assert len(sent) == len({*sent})
    assert {*sent} - {MANIFEST_FILE} == {*PARTS} - there_before


@pytest.mark.parametrize("size", [0, 100])
def test_a_push_that_is_killed_while_it_writes_its_manifest(
    tmp_path: Path, artifact: Path, there: Path, contents: Contents, size: int
) -> None:
    (there / MANIFEST_FILE).write_bytes((there / MANIFEST_FILE).read_bytes()[:size])
    refuse("artifact", "pull", url(there), tmp_path / "back")
    run("artifact", "push", artifact, url(there))
    assert contents(there) == contents(artifact)


@pytest.mark.parametrize("content", [b"of somebody else", bytes(2000) + b"1", bytes(2999) + b"1", bytes(4000), b""])
def test_files_of_others_at_the_destination_of_a_push(
    tmp_path: Path, artifact: Path, contents: Contents, content: bytes
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "part-0.bin").write_bytes(content)
    if content:
        cause, remedy = refuse("artifact", "push", artifact, url(tmp_path / "there"))
        assert cause == f"{url(tmp_path / 'there')} holds another part-0.bin, and no finished artifact."
        assert "--overwrite" in remedy
        assert contents(tmp_path / "there") == {"part-0.bin": content}
    run("artifact", "push", artifact, url(tmp_path / "there"), *(["--overwrite"] if content else []))
    assert contents(tmp_path / "there") == contents(artifact)


@pytest.mark.parametrize("name", ["part-0.bin", MANIFEST_FILE, "more"])
def test_a_link_at_the_destination_of_a_push_is_not_followed(tmp_path: Path, artifact: Path, name: str) -> None:
    there, outside = tmp_path / "there", tmp_path / "outside"
    outside.mkdir()
    (outside / "part-0.bin").write_bytes(b"of somebody else")
    there.mkdir()
    (tmp_path / "linked").symlink_to(there)
    (there / name).symlink_to(outside if name == "more" else outside / "part-0.bin")
    for options in ([], ["--overwrite"]):
        cause, _ = refuse("artifact", "push", artifact, url(tmp_path / "linked"), *options)
        assert "is a link" in cause
    assert {file.name: file.read_bytes() for file in outside.iterdir()} == {"part-0.bin": b"of somebody else"}
    (there / name).unlink()
    push(artifact, url(tmp_path / "linked"))


def test_a_killed_repair_is_completed_by_the_same_command(artifact: Path, there: Path, contents: Contents) -> None:
    (there / "part-0.bin").write_bytes(bytes(2999) + b"1")
    (there / "part-1.bin").write_bytes(bytes(3001))
    killed(lambda: push(artifact, url(there)), die_at(Store, "_send_part", 1))
    run("artifact", "push", artifact, url(there))
    assert contents(there) == contents(artifact)


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_killed_pull_is_completed_by_the_same_command(
    tmp_path: Path, artifact: Path, there: Path, contents: Contents, at: int
) -> None:
    back = tmp_path / "back"
    killed(lambda: run("artifact", "pull", url(there), back), die_at(Writer, "add_file", at))
    assert len(load_manifest(back).parts) == at - 1
    with pytest.raises(ArtifactError, match="is not finished") as raised:
        read_artifact(back, "results")
    assert raised.value.remedy.startswith("Run `tsdkd ")
    with patch.object(Transfer, "copy", autospec=True, side_effect=Transfer.copy) as copies:
        pull(url(there), back)
    assert copies.call_count == 5 - (at - 1)
    assert contents(back) == contents(artifact)


def test_an_unfinished_pull_names_the_command_that_completes_it(
    tmp_path: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["artifact", "pull", url(there), str(tmp_path / "back")]
    monkeypatch.setattr(sys, "argv", ["tsdkd", *command])
    killed(lambda: run(*command), die_at(Writer, "add_file", 2))
    cause, remedy = refuse("artifact", "push", tmp_path / "back", url(tmp_path / "other"))
    assert cause.endswith("back is not finished: 1 parts are written.")
    assert remedy == f"Run `tsdkd {' '.join(command)}` again to complete it."


@pytest.mark.parametrize("command", ["push", "pull"])
def test_ctrl_c_ends_with_130_and_keeps_complete_parts(
    tmp_path: Path, artifact: Path, there: Path, contents: Contents, command: str
) -> None:
    back = tmp_path / "back"
    words = ("artifact", "push", artifact, url(back)) if command == "push" else ("artifact", "pull", url(there), back)
    results = Transfer.each

    def interrupted(self: Transfer, work: object, items: object) -> Iterator[object]:
        for number, result in enumerate(results(self, work, items)):  # type: ignore[arg-type]
            yield result
            if number == 2 and back.exists():
                raise KeyboardInterrupt

    with patch.object(Transfer, "each", interrupted):
        refuse(*words, code=130)
    assert not (back / MANIFEST_FILE).exists() or load_manifest(back).state == "partial"
    assert contents(back).keys() & {*PARTS}
    run(*words)
    assert contents(back) == contents(artifact)


def test_an_error_stops_all_threads(tmp_path: Path) -> None:
    copied: list[int] = []
    transfer = Transfer(copied.append)

    def work(number: int) -> None:
        if number == 0:
            raise InputError("A cause.", "A remedy.")
        with open("/dev/zero", "rb") as source, open(os.devnull, "wb") as target:  # noqa: PTH123
            transfer.copy(source, target, 1 << 40, 1 << 10)

    with pytest.raises(InputError, match="A cause"):
        list(transfer.each(work, range(9)))


def test_a_changed_part_is_not_sent(tmp_path: Path, artifact: Path) -> None:
    (artifact / "part-1.bin").write_bytes(bytes(3001))
    cause, _ = refuse("artifact", "push", artifact, url(tmp_path / "there"))
    assert cause == f"{artifact}/part-1.bin has a hash that differs from the manifest."
    assert not (tmp_path / "there").exists()


def test_a_part_that_changes_while_it_is_sent_is_not_taken(tmp_path: Path, artifact: Path) -> None:
    with (
        patch("tsdkd.stages.share.stage._verify", lambda *_: (artifact / "part-1.bin").write_bytes(bytes(3001))),
        pytest.raises(ArtifactError, match=r"part-1.bin changed while it was sent"),
    ):
        push(artifact, url(tmp_path / "there"))
    assert not (tmp_path / "there" / MANIFEST_FILE).exists()


def test_other_bytes_than_were_sent_are_an_error(tmp_path: Path, artifact: Path) -> None:
    class Flipping:
        def __init__(self, stream: object, _: str) -> None:
            self.stream = stream

        def read(self, size: int) -> bytes:
            return self.stream.read(size)  # type: ignore[attr-defined, no-any-return]

        def write(self, data: bytes) -> None:
            self.stream.write(bytes(len(data)))  # type: ignore[attr-defined]

    with (
        patch.object(store_module, "_Translated", Flipping),
        pytest.raises(TsdkdError, match=r"other bytes of .* than"),
    ):
        push(artifact, url(tmp_path / "there"))
    assert not (tmp_path / "there" / MANIFEST_FILE).exists()


def test_an_unfinished_artifact_and_a_changed_manifest_are_not_pushed(tmp_path: Path, artifact: Path) -> None:
    with Writer.open(tmp_path / "partial", RESULTS) as writer:
        add(writer, "one", "one")
    cause, remedy = refuse("artifact", "push", tmp_path / "partial", url(tmp_path / "there"))
    assert cause.endswith("partial is not finished: 1 parts are written.")
    assert remedy == "Run `tsdkd eval` again to complete it."
    text = (artifact / MANIFEST_FILE).read_text()
    (artifact / MANIFEST_FILE).write_text(text.replace('"seed": 0', '"seed": 7'))
    cause, _ = refuse("artifact", "push", artifact, url(tmp_path / "there"))
    assert cause == f"{artifact}/manifest.json was changed after it was written."
    assert not (tmp_path / "there").exists()


def test_another_artifact_at_the_destination_of_a_push(
    tmp_path: Path, there: Path, sent: list[str], contents: Contents
) -> None:
    other = write_parts(tmp_path / "other", 3, seed=1).path
    before = contents(there)
    cause, remedy = refuse("artifact", "push", other, url(there))
    assert f"{url(there)} holds other results (" in cause
    assert "--overwrite" in remedy
    assert (contents(there), sent) == (before, [])
    (there / "notes.txt").write_text("of somebody else")
    run("artifact", "push", other, url(there), "--overwrite")
    assert contents(there) == contents(other) | {"notes.txt": b"of somebody else"}


def test_another_artifact_at_the_destination_of_a_pull(
    tmp_path: Path, artifact: Path, there: Path, contents: Contents
) -> None:
    other = write_parts(tmp_path / "other", 3, seed=1).path
    same_configuration = write_parts(tmp_path / "same", 3).path
    for path, reason in ((other, "another configuration: seed was 1, now 0"), (same_configuration, "other content")):
        before = contents(path)
        cause, remedy = refuse("artifact", "pull", url(there), path)
        assert reason in cause
        assert "--overwrite" in remedy
        assert contents(path) == before
        run("artifact", "pull", url(there), path, "--overwrite")
        assert contents(path) == contents(artifact)
        assert not list(tmp_path.glob(".*"))


def test_a_killed_overwriting_pull_keeps_the_old_artifact(
    tmp_path: Path, artifact: Path, there: Path, contents: Contents
) -> None:
    other = write_parts(tmp_path / "other", 3, seed=1).path
    before = contents(other)
    killed(lambda: pull(url(there), other, overwrite=True), die_at(Writer, "add_file", 3))
    assert contents(other) == before
    pull(url(there), other, overwrite=True)
    assert contents(other) == contents(artifact)


def test_a_pull_that_is_killed_before_it_replaces_an_artifact(
    tmp_path: Path, artifact: Path, there: Path, contents: Contents
) -> None:
    other = write_parts(tmp_path / "other", 3, seed=1).path
    killed(lambda: pull(url(there), other, overwrite=True), die_at(Writer, "finish", 1))
    pending = tmp_path / ".other.tsdkd-new"
    with Writer.open(pending, replace(load_manifest(pending))) as writer:
        writer.finish({})
    run("artifact", "pull", url(there), other, "--overwrite")
    assert contents(other) == contents(artifact)
    assert not pending.exists()


@pytest.mark.parametrize("begun", ["other", "new"])
def test_an_overwriting_pull_replaces_parts_of_a_begun_one(
    tmp_path: Path, artifact: Path, there: Path, contents: Contents, begun: str
) -> None:
    output = write_parts(tmp_path / "other", 3, seed=1).path.with_name(begun)
    same_configuration = write_parts(tmp_path / "same", 7, size=4000).path
    push(same_configuration, url(tmp_path / "earlier"))
    killed(lambda: pull(url(tmp_path / "earlier"), output, overwrite=True), die_at(Writer, "finish", 1))
    cause, _ = refuse("artifact", "pull", url(there), output)
    assert "other content" in cause
    run("artifact", "pull", url(there), output, "--overwrite")
    assert contents(output) == contents(artifact)


def test_a_killed_overwriting_push_leaves_nothing_finished(tmp_path: Path, there: Path, contents: Contents) -> None:
    other = write_parts(tmp_path / "other", 3, seed=1).path
    killed(lambda: push(other, url(there), overwrite=True), die_at(Store, "_send_part", 2))
    with pytest.raises(ArtifactError, match="no finished artifact"):
        pull(url(there), tmp_path / "back")
    push(other, url(there), overwrite=True)
    assert contents(there) == contents(other)


def test_an_unfinished_artifact_of_other_content_at_the_destination_of_a_pull(
    tmp_path: Path, there: Path, contents: Contents
) -> None:
    with Writer.open(tmp_path / "back", RESULTS) as writer:
        add(writer, "part-0.bin", "other")
    before = contents(tmp_path / "back")
    cause, _ = refuse("artifact", "pull", url(there), tmp_path / "back")
    assert "with other content than" in cause
    assert contents(tmp_path / "back") == before


def test_a_store_with_a_partial_manifest(tmp_path: Path, there: Path) -> None:
    change_manifest(there, state="partial")
    cause, _ = refuse("artifact", "pull", url(there), tmp_path / "back")
    assert cause == f"{url(there)} is not finished."


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"file": "../outside.bin"}, "which cannot name a part"),
        ({"file": "/tmp/outside.bin"}, "which cannot name a part"),
        ({"file": "more/../../outside.bin"}, "which cannot name a part"),
        ({"file": "manifest.json"}, "which cannot name a part"),
        ({"file": ".lock"}, "which cannot name a part"),
        ({"file": "absent.bin"}, r"absent.bin is missing at file://"),
        ({"bytes": 2999}, "has 3,000 bytes, not 2,999"),
        ({"bytes": 1 << 62}, "has 3,000 bytes, not 4,611,686,018,427,387,904"),
        ({"bytes": -1}, "less than 0"),
        ({"sha256": "0" * 64}, "has a hash that differs from the manifest"),
        ({"sha256": "../../x"}, "not a SHA-256"),
    ],
    ids=str,
)
def test_a_hostile_manifest(tmp_path: Path, there: Path, change: dict[str, object], reason: str) -> None:
    parts = parts_of(there)
    changed = next(part for part in parts if part["file"] == "part-0.bin")
    changed |= change
    change_manifest(there, parts=parts)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArtifactError, match=reason):
        pull(url(there), tmp_path / "deep" / "back")
    inside = tmp_path / "deep"
    assert [path for path in sorted(tmp_path.rglob("*")) if not path.is_relative_to(inside)] == before
    with pytest.raises((ArtifactError, FileNotFoundError)):
        read_artifact(inside / "back", "results")


def test_a_part_that_grows_or_shrinks_while_it_is_fetched(tmp_path: Path, there: Path) -> None:
    files = Store.files
    for size in (2999, 3001):

        def change(self: Store, size: int = size) -> object:
            found = files(self)
            (there / "part-0.bin").write_bytes(bytes(size))
            return found

        with patch.object(Store, "files", change), pytest.raises(TsdkdError, match=r"A file has (more|less) than"):
            pull(url(there), tmp_path / "back")
        (there / "part-0.bin").write_bytes(bytes(3000))


def test_unlisted_files_and_links_are_not_fetched(tmp_path: Path, there: Path) -> None:
    (there / "more" / ".bashrc").write_text("hostile")
    pull(url(there), tmp_path / "back")
    assert not list((tmp_path / "back").rglob(".bashrc"))
    (there / "part-0.bin").rename(tmp_path / "secret")
    (there / "part-0.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match=r"part-0.bin is missing at"):
        pull(url(there), tmp_path / "again")


def test_a_link_at_the_destination_leads_nowhere(tmp_path: Path, there: Path) -> None:
    (tmp_path / "outside").mkdir()
    killed(lambda: pull(url(there), tmp_path / "back"), die_at(Writer, "add_file", 2))
    if (tmp_path / "back" / "more").is_dir():
        for file in (tmp_path / "back" / "more").iterdir():
            file.unlink()
        (tmp_path / "back" / "more").rmdir()
    (tmp_path / "back" / "more").symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match=r"links to a file outside|is missing"):
        pull(url(there), tmp_path / "back")
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("content", [b" ", b"{}", b"[1]", b'{"format": 2}', b'{"format": 99}', bytes(1 << 20)])
def test_a_manifest_that_is_none(tmp_path: Path, artifact: Path, there: Path, content: bytes) -> None:
    (there / MANIFEST_FILE).write_bytes(content)
    refuse("artifact", "pull", url(there), tmp_path / "back")
    refuse("artifact", "push", artifact, url(there))
    assert not (tmp_path / "back").exists()
    run("artifact", "push", artifact, url(there), "--overwrite")


def test_the_manifest_keeps_the_bytes_of_a_later_tsdkd(tmp_path: Path, there: Path) -> None:
    change_manifest(there, later="a field")
    for _ in range(2):
        pull(url(there), tmp_path / "back")
        assert (tmp_path / "back" / MANIFEST_FILE).read_bytes() == (there / MANIFEST_FILE).read_bytes()


def test_a_disk_that_is_too_small(tmp_path: Path, there: Path) -> None:
    with patch("tsdkd.stages.share.stage.shutil.disk_usage") as usage:
        usage.return_value.free = 100
        cause, _ = refuse("artifact", "pull", url(there), tmp_path / "back")
    assert "GB more, and the disk of" in cause
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("store", "cause"),
    [
        ("s3://me:secret@bucket/path", "The URL holds a user name or a password."),
        ("s3://bucket/path?X-Amz-Signature=secret", "The URL holds a query (?...), which may be a key."),
        ("hf://me:secret@host/data", "The URL holds a user name or a password."),
        ("secret@bucket/path", "This is not the URL of a directory."),
        (
            "simplecache::s3://me:secret@bucket/path",
            "This is not the URL of a directory.",
        ),
        ("s3://", "This is not the URL of a directory."),
        ("what://bucket/path", "what://bucket/path cannot be opened (Protocol not known: what)."),
        ("hf://alone", "hf://alone names no repository of the hub."),
        ("hf://datasets/me/../data", "hf://datasets/me/../data names no repository of the hub."),
        ("hf://me/data@one/two@three", "hf://me/data@one/two@three names no repository of the hub."),
        ("hf://buckets/me/data", "hf://buckets/me/data names no repository of the hub."),
        ("hf://me/data", "hf://me/data is a model on the hub, and results cannot go there."),
    ],
)
def test_urls_that_are_refused(artifact: Path, store: str, cause: str) -> None:
    found, remedy = refuse("artifact", "push", artifact, store)
    assert found == cause
    assert "secret" not in found + remedy


def test_a_missing_package_names_its_extra(artifact: Path) -> None:
    with patch.dict(sys.modules, {"gcsfs": None}):
        _, remedy = refuse("artifact", "push", artifact, "gs://bucket/path")
    assert remedy == 'Install `pip install "tsdkd[gcs]"`.'


def test_a_destination_without_permission(tmp_path: Path, artifact: Path) -> None:
    with patch.object(fsspec.filesystem("memory").__class__, "_open", side_effect=PermissionError("no")):
        cause, remedy = refuse("artifact", "push", artifact, f"memory://{tmp_path}/there")
    assert cause == f"memory://{tmp_path}/there refuses access (no)."
    assert remedy == "Check its credentials, and check their permissions."


def test_checksums_that_stores_compute(artifact: Path) -> None:
    part = load_manifest(artifact).parts[1]
    file = artifact / part.file
    assert file.read_bytes() == bytes(3000)
    md5 = b64encode(hashlib.md5(bytes(3000)).digest()).decode()
    assert stored_checksum_is({"md5Hash": md5}, part, file) is True
    assert stored_checksum_is({"md5Hash": "AAAA"}, part, file) is False
    assert stored_checksum_is({"ETag": '"other"'}, part, file) is None
    assert stored_checksum_is({}, part, file) is None
    assert stored_checksum_is({"lfs": {"sha256": part.sha256}}, part, file) is True
    assert stored_checksum_is({"lfs": {"sha256": "0"}}, replace(part, sha256="1" * 64), file) is False


def test_a_part_of_another_size_is_not_there(artifact: Path, there: Path) -> None:
    part = load_manifest(artifact).parts[1]
    for info, there_ in ((None, False), ({"size": 2999}, False), ({"size": 3000}, True)):
        assert Store.open(url(there)).holds(info, part, artifact / part.file, Transfer()) is there_


def test_large_files_have_at_most_10_000_blocks() -> None:
    assert block_of(1) == block_of(10_000 << 24) == 1 << 24
    assert -(-(1 << 40) // block_of(1 << 40)) <= 10_000


@pytest.mark.parametrize(
    "message",
    [
        "https://host/x?sig=secret&se=1 failed",
        "no connection to http://me:secret@proxy:3128",
        "Max retries exceeded with url: /bucket/x?X-Amz-Signature=secret",
    ],
)
def test_messages_of_libraries_are_shown_without_secrets(tmp_path: Path, artifact: Path, message: str) -> None:
    with patch.object(fsspec.filesystem("memory").__class__, "_open", side_effect=OSError(message)):
        cause, remedy = refuse("artifact", "push", artifact, f"memory://{tmp_path}/there", code=1)
    assert "secret" not in cause + remedy
    assert ("proxy:3128" if "proxy" in message else "/x") in cause
