"""The hub by a small server on loopback (tests/helpers/hub_server.py), through huggingface_hub's own client."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from huggingface_hub import HfApi

from tests.helpers.artifacts import RESULTS, add, write_parts
from tests.helpers.commands import refuse, run
from tests.helpers.deaths import die_at, killed
from tests.helpers.hub_server import FakeHub, client_of, hub_server
from tests.helpers.runs import make_run
from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.manifest import Manifest, ModelRecord, Parent, load_manifest
from tsdkd.artifacts.writer import Writer
from tsdkd.stages.share.card import artifact_card
from tsdkd.stages.share.hub import HubAddress, HubStore
from tsdkd.stages.share.stage import pull, push

Contents = Callable[[Path], dict[str, bytes]]
DATA, STORE = "datasets/me/data", "hf://datasets/me/data/scores"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    with hub_server() as hub, client_of(hub):
        yield hub


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_parts(tmp_path / "artifact").path


def test_a_push_is_one_commit_to_a_private_dataset(
    tmp_path: Path, hub: FakeHub, artifact: Path, contents: Contents
) -> None:
    shown = run("artifact", "push", artifact, STORE)
    assert hub.private == {DATA: True}
    commit, tree = hub.commits[DATA][-1]
    assert len(hub.commits[DATA]) == 2
    assert {*tree} == {".gitattributes", "scores/README.md", *(f"scores/{name}" for name in contents(artifact))}
    assert f"tsdkd artifact pull hf://datasets/me/data@{commit}/scores DIR" in shown
    run("artifact", "pull", STORE, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(artifact)
    assert not (tmp_path / "back" / "README.md").exists()
    push(artifact, STORE)
    assert len(hub.commits[DATA]) == 2


def test_a_pull_reads_the_commit_that_is_there_now(
    tmp_path: Path, hub: FakeHub, artifact: Path, contents: Contents
) -> None:
    pinned = push(artifact, STORE)
    with patch("tsdkd.stages.share.stage._require_parts", lambda *_: hub.write(DATA, "scores/part-0.bin", b"later")):
        pull(STORE, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(artifact)
    cause, remedy = refuse("artifact", "pull", STORE, tmp_path / "later")
    assert cause.startswith("part-0.bin has 5 bytes, not 3,000 at hf://datasets/me/data@")
    assert "another revision" in remedy
    pull(pinned, tmp_path / "later")
    repository, _, path = STORE.rpartition("/")
    pull(f"{repository}/{path}@{pinned.partition('@')[2].partition('/')[0]}", tmp_path / "at_the_end")


def test_an_interrupted_push_sends_no_large_file_twice(hub: FakeHub, artifact: Path) -> None:
    hub.refuse_uploads_after = 2
    cause, remedy = refuse("artifact", "push", artifact, STORE)
    assert cause.startswith(f"{STORE} refuses access (")
    assert "secret-signature" not in cause
    assert remedy.startswith("Set HF_TOKEN, or run `hf auth login`")
    assert MANIFEST_FILE not in str(hub.tree(DATA))
    hub.refuse_uploads_after = None
    push(artifact, STORE)
    assert len(hub.uploads) == len({*hub.uploads}) == 4


def test_a_killed_push_is_completed(tmp_path: Path, hub: FakeHub, artifact: Path, contents: Contents) -> None:
    killed(lambda: push(artifact, STORE), die_at(HfApi, "create_commit", 1))
    refuse("artifact", "pull", STORE, tmp_path / "back")
    sent = list(hub.uploads)
    assert len(sent) == 4
    push(artifact, STORE)
    pull(STORE, tmp_path / "back")
    assert hub.uploads == sent
    assert contents(tmp_path / "back") == contents(artifact)


def test_overwriting_is_one_commit(tmp_path: Path, hub: FakeHub, artifact: Path, contents: Contents) -> None:
    push(artifact, STORE)
    card = hub.contents[hub.tree(DATA)["scores/README.md"]]
    hub.write(DATA, "scores/README.md", card.replace(b"---\n", b"---\nlicense: mit\n", 1))
    other = write_parts(tmp_path / "other", 3, seed=1).path
    cause, _ = refuse("artifact", "push", other, STORE)
    assert "holds other results" in cause
    assert len(hub.commits[DATA]) == 3
    run("artifact", "push", other, STORE, "--overwrite")
    assert len(hub.commits[DATA]) == 4
    tree = hub.tree(DATA)
    assert {*tree} == {".gitattributes", "scores/README.md", *(f"scores/{name}" for name in contents(other))}
    card = hub.contents[tree["scores/README.md"]]
    assert b"license: mit" in card
    assert load_manifest(other).fingerprint[:16].encode() in card


def test_a_push_does_not_replace_one_that_came_meanwhile(tmp_path: Path, hub: FakeHub, artifact: Path) -> None:
    other, send = write_parts(tmp_path / "other", 3, seed=1).path, HubStore.send

    def second(*args: object) -> str:
        with patch.object(HubStore, "send", send):
            push(other, STORE)
        return send(*args)  # type: ignore[arg-type]

    with patch.object(HubStore, "send", second):
        cause, remedy = refuse("artifact", "push", artifact, STORE)
    assert cause.startswith(f"{STORE} changed during the push (")
    assert remedy.startswith("Run the same command again")
    pull(STORE, tmp_path / "back")
    assert load_manifest(tmp_path / "back") == load_manifest(other)


def test_a_checkpoint_keeps_its_model_card(tmp_path: Path, hub: FakeHub, contents: Contents) -> None:
    checkpoint = make_run(tmp_path / "run") / "checkpoint"
    push(checkpoint, "hf://me/model")
    assert b"tsdkd artifact pull hf://me/model " in hub.contents[hub.tree("models/me/model")["README.md"]]
    pull("hf://me/model", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(checkpoint)
    cause, _ = refuse("artifact", "push", checkpoint, STORE)
    assert cause == f"{STORE} is a dataset on the hub, and checkpoint cannot go there."


def test_a_card_that_is_a_part_is_sent_as_it_is(tmp_path: Path, hub: FakeHub) -> None:
    with Writer.open(tmp_path / "a", RESULTS) as writer:
        add(writer, "README.md", "# A card")
        writer.finish({})
    push(tmp_path / "a", "hf://datasets/me/data")
    assert hub.contents[hub.tree(DATA)["README.md"]] == b"# A card"


def test_a_card_that_the_hub_refuses(tmp_path: Path, hub: FakeHub) -> None:
    with Writer.open(tmp_path / "a", RESULTS) as writer:
        add(writer, "README.md", "---\nbase_model: /home/somebody/small\n---\n")
        writer.finish({})
    cause, remedy = refuse("artifact", "push", tmp_path / "a", "hf://datasets/me/data")
    assert cause.endswith("refuses the card (Invalid metadata in README.md. - Error: base_model is not valid.).")
    assert "README.md" in remedy


def test_other_bytes_on_the_hub_are_an_error(hub: FakeHub, artifact: Path) -> None:
    store = hub.store
    hub.store = lambda content: store(content[:-1] + b"!") if content.endswith(b"\4" * 9) else store(content)  # type: ignore[method-assign]
    cause, _ = refuse("artifact", "push", artifact, STORE, code=1)
    assert "holds other bytes of more/last.txt than were sent" in cause


def test_what_the_hub_refuses(tmp_path: Path, hub: FakeHub, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cause, _ = refuse("artifact", "pull", STORE, tmp_path / "back")
    assert cause.startswith(f"{STORE} does not exist (")
    push(artifact, STORE)
    cause, _ = refuse("artifact", "pull", "hf://datasets/me/data@v9/scores", tmp_path / "back")
    assert cause.startswith("hf://datasets/me/data@v9/scores does not exist (")
    cause, _ = refuse("artifact", "pull", "hf://datasets/me/data/none", tmp_path / "back")
    assert "holds no finished artifact" in cause
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_secret")
    for command in (("push", artifact, STORE), ("pull", STORE, tmp_path / "back")):
        cause, remedy = refuse("artifact", *command)
        assert "401" in cause
        assert cause.count("\n") == 0
        assert "hf_wrong_secret" not in cause + remedy
    assert not (tmp_path / "back").exists()


def test_a_card_names_no_path() -> None:
    models = (
        ModelRecord("student", "/home/somebody/small", "a" * 64, "t", "c"),
        ModelRecord("teacher", "org/large", "b", "t", "c"),
        ModelRecord("teacher:a|<b>", "org/other", "b", "t", "c"),
    )
    parents = (Parent("prompts", "c" * 64, "../../home/somebody/p.jsonl"), Parent("dataset", "d", "org/prompts"))
    card = artifact_card(Manifest("rollouts", {}, 0, parents, models), "hf://datasets/me/data")
    assert "| student | small | " in card
    assert "| teacher | org/large | " in card
    assert r"| teacher:a\|\<b\> | org/other | " in card
    assert "org/prompts" in card
    assert "somebody" not in card
    assert "license" not in card


def test_addresses() -> None:
    address = HubAddress.parse("hf://datasets/me/data@refs%2Fpr%2F1/a/b")
    assert address == HubAddress("dataset", "me/data", "refs/pr/1", "a/b")
    assert address.at(address.revision) == "datasets/me/data@refs%2Fpr%2F1/a/b"
    assert HubAddress.parse("hf://me/model") == HubAddress("model", "me/model", None, "")
