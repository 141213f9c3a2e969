"""S3 by moto's server on loopback, an emulator: its ETags, multipart uploads and errors, through s3fs."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import fsspec
import pytest

from tests.helpers.artifacts import write_parts
from tests.helpers.commands import refuse, run
from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.stages.share import place as place_module
from tsdkd.stages.share.place import Place
from tsdkd.stages.share.stage import push
from tsdkd.stages.share.transfer import Transfer

moto = pytest.importorskip("moto.server", reason="needs moto with flask (pip install 'tsdkd[dev]')")
pytest.importorskip("s3fs", reason="needs s3fs (pip install 'tsdkd[s3]')")
Contents = Callable[[Path], dict[str, bytes]]
MIB = 1 << 20
KILLED = """
import os, signal, sys
from tsdkd.cli import main
from tsdkd.stages.share.{module} import {cls}
calls, method = iter(range(1, 1000)), {cls}.{name}

def wrapped(*args, **more):
    if next(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return method(*args, **more)

{cls}.{name} = wrapped
main()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    environment = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret-key",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    name = tmp_path.name.lower().replace("_", "-")[:60]
    fsspec.filesystem("s3").mkdir(name)
    return name


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_parts(tmp_path / "artifact").path


def test_push_and_pull(tmp_path: Path, bucket: str, artifact: Path, contents: Contents) -> None:
    place = f"s3://{bucket}/some/run"
    run("artifact", "push", artifact, place)
    run("artifact", "pull", place, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(artifact)
    with patch.object(Place, "reading", autospec=True, side_effect=Place.reading) as reads:
        assert "nothing to do" not in run("artifact", "push", artifact, place)
    assert [call.args[1] for call in reads.mock_calls if len(call.args) > 1] == [MANIFEST_FILE]  # ETags suffice


def test_multipart_uploads_are_checked_by_their_etag(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place_module, "BLOCK", 5 * MIB)
    for number, size in enumerate((5 * MIB, 5 * MIB - 1, 10 * MIB + 7)):
        artifact = write_parts(tmp_path / f"a{number}", 1, size=size).path
        with patch.object(Transfer, "copy", autospec=True, side_effect=Transfer.copy) as copies:
            push(artifact, f"s3://{bucket}/{number}")
        assert copies.call_count == 1  # nothing is read back
        info = Place.open(f"s3://{bucket}/{number}").files()["more/last.txt"]
        assert info["ETag"].strip('"').partition("-")[2] == ["1", "", "3"][number]
        run("artifact", "pull", f"s3://{bucket}/{number}", tmp_path / f"b{number}")


def test_an_object_with_another_etag_is_read_back(bucket: str, artifact: Path) -> None:
    push(artifact, f"s3://{bucket}/a")
    with patch.object(place_module, "_etag", lambda *_: "of another block size"), patch.object(Place, "send") as sent:
        push(artifact, f"s3://{bucket}/a")
    sent.assert_not_called()


def test_a_failed_upload_leaves_no_object(bucket: str, artifact: Path) -> None:
    (artifact / "part-1.bin").write_bytes(bytes(3001))
    with patch("tsdkd.stages.share.stage._verify"):
        refuse("artifact", "push", artifact, f"s3://{bucket}/a")
    assert {MANIFEST_FILE, "part-1.bin"}.isdisjoint(Place.open(f"s3://{bucket}/a").files())


def killed(*command: object, module: str, cls: str, name: str, call: int) -> None:
    program = KILLED.format(module=module, cls=cls, name=name, call=call)
    found = subprocess.run([sys.executable, "-c", program, *map(str, command)], capture_output=True, check=False)
    assert found.returncode == -signal.SIGKILL, found.stderr


def test_a_killed_push_and_a_killed_pull_are_completed(
    tmp_path: Path, bucket: str, artifact: Path, contents: Contents
) -> None:
    place = f"s3://{bucket}/a"
    killed("artifact", "push", artifact, place, module="transfer", cls="Transfer", name="_count", call=5)
    there = Place.open(place).files()
    assert MANIFEST_FILE not in there
    refuse("artifact", "pull", place, tmp_path / "back")
    with patch.object(Place, "_send_part", autospec=True, side_effect=Place._send_part) as sent:
        run("artifact", "push", artifact, place)
    assert sent.call_count == 5 - len(there)
    killed("artifact", "pull", place, tmp_path / "back", module="transfer", cls="Transfer", name="_count", call=5)
    run("artifact", "pull", place, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(artifact)


def test_what_s3_refuses(tmp_path: Path, bucket: str, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cause, remedy = refuse("artifact", "push", artifact, "s3://no-such-bucket/a")
    assert cause == "s3://no-such-bucket/a does not exist (The specified bucket does not exist)."
    assert "make a bucket" in remedy
    cause, _ = refuse("artifact", "pull", "s3://no-such-bucket/a", tmp_path / "back")
    assert "holds no finished artifact" in cause or "does not exist" in cause
    fs = fsspec.filesystem("s3")
    with patch.object(type(fs), "_open", side_effect=PermissionError("Access Denied")):
        cause, remedy = refuse("artifact", "push", artifact, f"s3://{bucket}/a")
    assert cause == f"s3://{bucket}/a refuses access (Access Denied)."
    assert remedy.startswith("Set AWS_ACCESS_KEY_ID and ")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fs.clear_instance_cache()
    cause, remedy = refuse("artifact", "push", artifact, f"s3://{bucket}/a")
    assert cause == f"s3://{bucket}/a needs credentials, and none were found (Unable to locate credentials)."
    assert not (tmp_path / "back").exists()


def test_an_unreachable_server(bucket: str, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
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
