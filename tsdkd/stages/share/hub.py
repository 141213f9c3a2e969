"""A directory of a repository on the hub: datasets hold rollouts, scores and results, models hold checkpoints.

A push is one commit. Its large files are uploaded before, so an interrupted push changes nothing that readers see, and
the hub takes no file twice.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem
from huggingface_hub.utils import HFValidationError, disable_progress_bars, enable_progress_bars, validate_repo_id
from huggingface_hub.utils import are_progress_bars_disabled as _without_bars

from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.manifest import ArtifactKind, Manifest, Part
from tsdkd.artifacts.reader import part_path
from tsdkd.errors import InputError
from tsdkd.stages.observer import Observer
from tsdkd.stages.share.card import CARD_FILE, artifact_card
from tsdkd.stages.share.errors import translate_errors
from tsdkd.stages.share.store import Store
from tsdkd.stages.share.transfer import WORKERS, Transfer

BATCH_BYTES, BATCH_FILES = 1 << 30, 64
"""Uploads after which the progress advances."""
MAX_CARD = 1 << 20
FORMS = "hf://datasets/USER/NAME[/PATH] for rollouts, scores and results, hf://USER/NAME[/PATH] for a checkpoint"
OTHER_REPOSITORIES = {"buckets", "kernels", "models", "spaces"}


@dataclass(frozen=True)
class HubAddress:
    """What a URL `hf://[datasets/]USER/NAME[@REVISION][/PATH]` names; @REVISION may also stand at its end."""

    kind: str
    """The hub's type of repository: "dataset" or "model"."""
    repository: str
    revision: str | None
    path: str

    @classmethod
    def parse(cls, url: str) -> "HubAddress":
        """Raises InputError."""
        words = url.removeprefix("hf://").split("/")
        kind = "dataset" if words[0] == "datasets" else "model"
        words = words[1:] if kind == "dataset" else words
        revisions = [word.split("@", 1)[1] for word in words if "@" in word]
        names = [word.split("@", 1)[0] for word in words]
        wrong = len(names) < 2 or len(revisions) > 1 or names[0] in OTHER_REPOSITORIES or {"", ".", ".."} & {*names}
        try:
            validate_repo_id("" if wrong else "/".join(names[:2]))
        except HFValidationError:
            raise InputError(f"{url} names no repository of the hub.", f"Name it as {FORMS}.") from None
        return cls(kind, "/".join(names[:2]), unquote(revisions[0]) if revisions else None, "/".join(names[2:]))

    def at(self, revision: str | None) -> str:
        """The URL at another revision, without `hf://`."""
        pinned = f"@{quote(revision, safe='')}" if revision else ""
        path = f"/{self.path}" if self.path else ""
        return f"{'datasets/' * (self.kind == 'dataset')}{self.repository}{pinned}{path}"

    def name_in_repository(self, name: str) -> str:
        return f"{self.path}/{name}" if self.path else name


class HubStore(Store):
    """A directory of a repository at a revision."""

    def __init__(self, url: str, address: HubAddress, commit: str) -> None:
        """`commit`: what is read, and what a push follows."""
        super().__init__(url, HfFileSystem(skip_instance_cache=True), address.at(commit))
        self.address, self.commit = address, commit
        self.api = HfApi()

    @classmethod
    def to_read(cls, url: str) -> "HubStore":
        """A store at the commit that the URL means now."""
        address = HubAddress.parse(url)
        return cls._at_commit(address, _commit_now(url, address))

    @classmethod
    def to_write(cls, url: str, kind: ArtifactKind, observer: Observer) -> "HubStore":
        """A store in a repository of the type that `kind` needs. A missing repository is made, private."""
        address = HubAddress.parse(url)
        if (address.kind == "model") != (kind == "checkpoint"):
            raise InputError(f"{url} is a {address.kind} on the hub, and {kind} cannot go there.", f"Name {FORMS}.")
        api = HfApi()
        with translate_errors(url):
            if not api.repo_exists(address.repository, repo_type=address.kind):
                api.create_repo(address.repository, repo_type=address.kind, private=True, exist_ok=True)
                observer.info(f"Made the private {address.kind} {address.repository} on the hub.")
        return cls(url, address, _commit_now(url, address))

    @classmethod
    def _at_commit(cls, address: HubAddress, commit: str) -> "HubStore":
        return cls(f"hf://{address.at(commit)}", address, commit)

    def send(
        self,
        source: Path,
        manifest: Manifest,
        parts: Collection[Part],
        stale: Collection[str],
        replaces: bool,
        observer: Observer,
    ) -> str:
        """Commit the deletion of `stale` files, `parts`, the manifest and a card. Returns the URL at this commit.

        The hub refuses the commit if another one came after `self.commit`: it may hold another artifact.

        An existing card stays. If the commit `replaces` another artifact, only the card's front matter stays.
        """
        uploads = [self._addition(part.file, part_path(source, part)) for part in parts]
        sizes = {self.address.name_in_repository(part.file): part.bytes for part in parts}
        others = [self._addition(MANIFEST_FILE, source / MANIFEST_FILE)]
        has_card = CARD_FILE in self.files()
        if CARD_FILE not in {part.file for part in manifest.parts} and (replaces or not has_card):
            older = self._read_card() if has_card else ""
            others.append(self._addition(CARD_FILE, artifact_card(manifest, self.url, older).encode()))
        added = {operation.path_in_repo for operation in (*uploads, *others)}
        deleted = [name for name in map(self.address.name_in_repository, stale) if name not in added]
        address = self.address
        with observer.progress("sending", sum(sizes.values()), "bytes") as advance, _no_bars():
            for batch in _batches(uploads, lambda operation: sizes[operation.path_in_repo]):
                with translate_errors(self.url):
                    self.api.preupload_lfs_files(
                        address.repository,
                        batch,
                        repo_type=address.kind,
                        revision=address.revision,
                        num_threads=WORKERS,
                        free_memory=False,
                    )
                advance(sum(sizes[operation.path_in_repo] for operation in batch))
        with _no_bars(), translate_errors(self.url), _card_errors(self.url):
            commit = self.api.create_commit(
                address.repository,
                [*uploads, *(CommitOperationDelete(name) for name in deleted), *others],
                commit_message=f"{manifest.kind} {manifest.fingerprint[:12]}, by tsdkd artifact push",
                repo_type=address.kind,
                revision=address.revision,
                parent_commit=self.commit,
                num_threads=WORKERS,
            )
        sent = HubStore._at_commit(address, str(commit.oid))
        self._require_arrived(sent, source, manifest)
        return sent.url

    def _require_arrived(self, sent: "HubStore", source: Path, manifest: Manifest) -> None:
        files, transfer = sent.files(), Transfer()
        for part in manifest.parts:
            if not sent.holds(files.get(part.file), part, part_path(source, part), transfer):
                raise self.not_arrived(part.file)
        if sent.read_manifest() != (source / MANIFEST_FILE).read_bytes():
            raise self.not_arrived(MANIFEST_FILE)

    def _read_card(self) -> str:
        with self.reading(CARD_FILE) as stream:
            return stream.read(MAX_CARD).decode(errors="replace")

    def _addition(self, name: str, content: Path | bytes) -> CommitOperationAdd:
        return CommitOperationAdd(self.address.name_in_repository(name), content)


def _commit_now(url: str, address: HubAddress) -> str:
    with translate_errors(url):
        return str(HfApi().repo_info(address.repository, repo_type=address.kind, revision=address.revision).sha)


def _batches(
    operations: Collection[CommitOperationAdd], size: Callable[[CommitOperationAdd], int]
) -> Iterator[list[CommitOperationAdd]]:
    batch: list[CommitOperationAdd] = []
    for operation in operations:
        batch.append(operation)
        if len(batch) == BATCH_FILES or sum(map(size, batch)) >= BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


@contextmanager
def _card_errors(url: str) -> Iterator[None]:
    """Raise InputError for a card whose front matter the hub refuses; huggingface_hub asks before it commits."""
    try:
        yield
    except ValueError as error:
        if "Invalid metadata" not in str(error):
            raise
        raise InputError(
            f"{url} refuses the card ({' '.join(str(error).split())}).",
            "Correct README.md on the hub; for a checkpoint, train it again: its card is one of its parts.",
        ) from None


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of huggingface_hub, beside which the observer's would be unreadable."""
    shown = not _without_bars()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
