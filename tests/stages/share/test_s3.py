"""S3 by moto's server on loopback, an emulator: its ETags, multipart uploads and errors, through s3fs."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import fsspec
import pytest

from tests.helpers.artifacts import write_parts
from tests.helpers.commands import refuse, run
from tests.helpers.deaths import die_at, killed
from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.stages.share import store as store_module
from tsdkd.stages.share.stage import pull, push
from tsdkd.stages.share.store import Store
from tsdkd.stages.share.transfer import Transfer

pytestmark = pytest.mark.skipif(
    not all(map(find_spec, ("moto", "flask", "s3fs"))), reason="needs moto, flask and s3fs (pip install 'tsdkd[dev]')"
)
Contents = Callable[[Path], dict[str, bytes]]
MIB = 1 << 20


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.helpers.s3_server"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    nowhere = str(tmp_path_factory.mktemp("aws") / "none")
    environment = {
        "AWS_ENDPOINT_URL": server.stdout.readline().strip(),
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret-key",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": nowhere,
        "AWS_SHARED_CREDENTIALS_FILE": nowhere,
    }
    with patch.dict(os.environ, environment), patch("os.fsync"):
        yield
    server.communicate()


@pytest.fixture
def bucket(s3: None, tmp_path: Path) -> str:
    name = tmp_path.name.lower().replace("_", "-")[:60]
    fsspec.filesystem("s3").mkdir(name)
    return name


@contextmanager
def environment(**changes: str) -> Iterator[None]:
    """s3fs reads the environment once for each file system that it makes."""
    kind = fsspec.get_filesystem_class("s3")
    kind.clear_instance_cache()
    with patch.dict(os.environ, changes):
        yield
    kind.clear_instance_cache()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_parts(tmp_path / "artifact").path


def test_push_and_pull(tmp_path: Path, bucket: str, artifact: Path, contents: Contents) -> None:
    store = f"s3://{bucket}/some/run"
    with patch.object(fsspec.get_filesystem_class("s3"), "makedirs") as made:  # it would make a bucket
        run("artifact", "push", artifact, store)
    made.assert_not_called()
    run("artifact", "pull", store, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(artifact)
    with patch.object(Store, "reading", autospec=True, side_effect=Store.reading) as reads:
        assert "nothing to do" not in run("artifact", "push", artifact, store)
    assert [call.args[1] for call in reads.mock_calls if len(call.args) > 1] == [MANIFEST_FILE]  # ETags suffice


def test_multipart_uploads_are_checked_by_their_etag(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "BLOCK", 5 * MIB)
    for number, size in enumerate((5 * MIB, 5 * MIB - 1, 10 * MIB + 7)):
        artifact = write_parts(tmp_path / f"a{number}", 1, size=size).path
        with patch.object(Transfer, "copy", autospec=True, side_effect=Transfer.copy) as copies:
            push(artifact, f"s3://{bucket}/{number}")
        assert copies.call_count == 1  # nothing is read back
        info = Store.open(f"s3://{bucket}/{number}").files()["more/last.txt"]
        assert info["ETag"].strip('"').partition("-")[2] == ["1", "", "3"][number]
        run("artifact", "pull", f"s3://{bucket}/{number}", tmp_path / f"b{number}")


def test_an_object_with_another_etag_is_read_back(bucket: str, artifact: Path) -> None:
    push(artifact, f"s3://{bucket}/a")
    with patch.object(store_module, "_etag", lambda *_: "of another block size"), patch.object(Store, "send") as sent:
        push(artifact, f"s3://{bucket}/a")
    sent.assert_not_called()


def test_a_failed_upload_leaves_no_object(bucket: str, artifact: Path) -> None:
    (artifact / "part-1.bin").write_bytes(bytes(3001))
    with patch("tsdkd.stages.share.stage._verify"):
        refuse("artifact", "push", artifact, f"s3://{bucket}/a")
    assert {MANIFEST_FILE, "part-1.bin"}.isdisjoint(Store.open(f"s3://{bucket}/a").files())


def test_a_killed_push_and_a_killed_pull_are_completed(
    tmp_path: Path, bucket: str, artifact: Path, contents: Contents
) -> None:
    store = f"s3://{bucket}/a"
    killed(lambda: push(artifact, store), die_at(Transfer, "_count", 5))
    there = Store.open(store).files()
    assert MANIFEST_FILE not in there
    refuse("artifact", "pull", store, tmp_path / "back")
    with patch.object(Store, "_send_part", autospec=True, side_effect=Store._send_part) as sent:
        run("artifact", "push", artifact, store)
    assert sent.call_count == 5 - len(there)
    killed(lambda: pull(store, tmp_path / "back"), die_at(Transfer, "_count", 5))
    run("artifact", "pull", store, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(artifact)


def test_what_s3_refuses(tmp_path: Path, bucket: str, artifact: Path) -> None:
    cause, remedy = refuse("artifact", "push", artifact, "s3://no-such-bucket/a")
    assert cause == "s3://no-such-bucket/a does not exist (The specified bucket does not exist)."
    assert "make a bucket" in remedy
    cause, _ = refuse("artifact", "pull", "s3://no-such-bucket/a", tmp_path / "back")
    assert "holds no finished artifact" in cause
    with patch.object(fsspec.get_filesystem_class("s3"), "_open", side_effect=PermissionError("Access Denied")):
        cause, remedy = refuse("artifact", "push", artifact, f"s3://{bucket}/a")
    assert cause == f"s3://{bucket}/a refuses access (Access Denied)."
    assert remedy.startswith("Set AWS_ACCESS_KEY_ID and ")
    assert not (tmp_path / "back").exists()


def test_missing_credentials(bucket: str, artifact: Path) -> None:
    with environment(AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY=""):
        cause, remedy = refuse("artifact", "push", artifact, f"s3://{bucket}/a")
    assert cause == f"s3://{bucket}/a needs credentials, and none were found (Unable to locate credentials)."
    assert remedy == "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."


def test_an_unreachable_server(bucket: str, artifact: Path) -> None:
    with environment(AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_MAX_ATTEMPTS="1"):
        cause, remedy = refuse("artifact", "push", artifact, f"s3://{bucket}/a", code=1)
    assert "127.0.0.1:9" in cause
    assert "Run the same command again" in remedy
    assert "secret-key" not in cause


def test_no_secret_is_written(tmp_path: Path, bucket: str, artifact: Path) -> None:
    run("artifact", "push", artifact, f"s3://{bucket}/a")
    run("artifact", "pull", f"s3://{bucket}/a", tmp_path / "back")
    secrets = (os.environ["AWS_SECRET_ACCESS_KEY"].encode(), b"AWS_")
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert not [secret for secret in secrets if secret in written]
