"""A small hub on loopback: repositories in memory, with the routes that huggingface_hub calls for a push and a pull.

Files are stored as large files (LFS, without Xet) or as git blobs, as the hub does it.
"""

import hashlib
import json
import os
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

TOKEN = "hf_test"
URL_OF_A_FILE = "{repo_id}/resolve/{revision}/{filename}"
LARGE = (".parquet", ".safetensors", ".bin")
Tree = dict[str, str]
"""The digest of each file, by its path."""


@dataclass
class FakeHub:
    """The state of the hub; tests look at it and change it."""

    endpoint: str = ""
    commits: dict[str, list[tuple[str, Tree]]] = field(default_factory=dict)
    """Each repository's commits with their files, oldest first."""
    contents: dict[str, bytes] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    """The digests of the large files that were sent, in their order."""
    refuse_uploads_after: int | None = None

    def tree(self, repository: str, revision: str = "main") -> Tree:
        commits = self.commits[repository]
        return dict(commits[-1][1]) if revision == "main" else dict(dict(commits)[revision])

    def commit(self, repository: str, tree: Tree) -> str:
        commits = self.commits[repository]
        commit = hashlib.sha1(f"{repository} {len(commits)} {tree}".encode()).hexdigest()
        commits.append((commit, tree))
        return commit

    def write(self, repository: str, path: str, content: bytes) -> str:
        """Commit one file, as a person does on the hub's pages. Returns the commit."""
        return self.commit(repository, self.tree(repository) | {path: self.store(content)})

    def store(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.contents[digest] = content
        return digest

    def entry(self, path: str, digest: str) -> dict[str, Any]:
        content = self.contents[digest]
        large = {"lfs": {"oid": digest, "size": len(content), "pointerSize": 130}} if path.endswith(LARGE) else {}
        return {"type": "file", "path": path, "size": len(content), "oid": git_digest(content), **large}


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def hub_server() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(_Handler):
        state = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request(b"")

    def do_HEAD(self) -> None:
        self.handle_request(b"")

    def do_POST(self) -> None:
        self.handle_request(self.rfile.read(int(self.headers["Content-Length"] or 0)))

    def do_PUT(self) -> None:
        self.do_POST()

    def handle_request(self, body: bytes) -> None:
        words = [unquote(word) for word in urlsplit(self.path).path.strip("/").split("/")]
        if words[0] == "lfs":
            self.receive(words[1], body)
        elif self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.respond(401, {"error": "Invalid credentials"})
        elif words == ["api", "repos", "create"]:
            self.create(json.loads(body))
        elif words == ["api", "validate-yaml"]:
            wrong = "base_model: /" in json.loads(body)["content"]
            errors = [{"message": "Error: base_model is not valid."}] if wrong else []
            self.respond(400 if wrong else 200, {"errors": errors, "warnings": []})
        else:
            is_whole = words[0] in {"api", "datasets"}
            self.route(words[words[0] == "api" :] if is_whole else ["models", *words], body)

    def route(self, words: list[str], body: bytes) -> None:
        """`words`: datasets or models, user, name, then the route, a revision and a path."""
        repository = "/".join(words[:3]).removesuffix(".git")
        route, revision, *path = [*words[3:], "revision", "main"][: max(2, len(words) - 3)]
        if repository not in self.state.commits:
            self.respond(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif route == "info":
            self.batch(json.loads(body))
        elif revision != "main" and revision not in dict(self.state.commits[repository]):
            self.respond(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            getattr(self, f"on_{route.replace('-', '_')}")(repository, revision, "/".join(path), body)

    def on_revision(self, repository: str, revision: str, *_: object) -> None:
        commit = self.state.commits[repository][-1][0] if revision == "main" else revision
        self.respond(200, {"id": repository.split("/", 1)[1], "sha": commit, "private": self.state.private[repository]})

    def create(self, wanted: dict[str, Any]) -> None:
        repository = f"{wanted.get('type', 'model')}s/{wanted.get('organization') or 'user'}/{wanted['name']}"
        self.state.commits[repository] = []
        self.state.private[repository] = wanted["visibility"] == "private"
        self.state.commit(repository, {".gitattributes": self.state.store(b"*.parquet filter=lfs\n")})
        self.respond(200, {"url": f"{self.state.endpoint}/{repository}", "name": repository})

    def on_preupload(self, repository: str, revision: str, path: str, body: bytes) -> None:
        files = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
            for file in json.loads(body)["files"]
        ]
        self.respond(200, {"files": [{**file, "shouldIgnore": False} for file in files]})

    def batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for item in wanted["objects"]:
            href = f"{self.state.endpoint}/lfs/{item['oid']}?signature=secret-signature"
            known = item["oid"] in self.state.contents
            objects.append({**item, **({} if known else {"actions": {"upload": {"href": href}}})})
        self.respond(200, {"transfer": "basic", "objects": objects})

    def receive(self, digest: str, body: bytes) -> None:
        limit = self.state.refuse_uploads_after
        if limit is not None and len(self.state.uploads) >= limit:
            self.respond(403, {"error": "no"})
        else:
            assert self.state.store(body) == digest
            self.state.uploads.append(digest)
            self.respond(200, {})

    def on_commit(self, repository: str, revision: str, path: str, body: bytes) -> None:
        tree, latest = self.state.tree(repository, revision), self.state.commits[repository][-1][0]
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit", latest) != latest:
                self.respond(412, {"error": "A commit has happened since. Please refresh and try again."})
                return
            if item["key"] == "file":
                tree[value["path"]] = self.state.store(b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                assert value["oid"] in self.state.contents
                tree[value["path"]] = value["oid"]
            elif item["key"] == "deletedFile":
                del tree[value["path"]]
        commit = self.state.commit(repository, tree)
        self.respond(200, {"commitUrl": f"{self.state.endpoint}/{repository}/commit/{commit}", "commitOid": commit})

    def on_tree(self, repository: str, revision: str, path: str, _: bytes) -> None:
        entries = [
            self.state.entry(name, digest)
            for name, digest in self.state.tree(repository, revision).items()
            if not path or name.startswith(f"{path}/")
        ]
        if path and not entries:
            self.respond(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        else:
            self.respond(200, entries)

    def on_paths_info(self, repository: str, revision: str, path: str, body: bytes) -> None:
        wanted = json.loads(body)["paths"] if body.startswith(b"{") else []
        tree = self.state.tree(repository, revision)
        self.respond(200, [self.state.entry(name, tree[name]) for name in wanted if name in tree])

    def on_resolve(self, repository: str, revision: str, path: str, _: bytes) -> None:
        tree = self.state.tree(repository, revision)
        content = self.state.contents.get(tree.get(path, ""))
        if content is None:
            self.respond(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        elif wanted := self.headers["Range"]:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            self.respond(206, content[first : last + 1])
        else:
            self.respond(200, content)

    def respond(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def client_of(hub: FakeHub) -> Iterator[None]:
    """Point huggingface_hub in this process to a hub. It reads its settings once, from the environment."""
    with (
        patch.object(constants, "ENDPOINT", hub.endpoint),
        patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.endpoint}/{URL_OF_A_FILE}"),
        patch.object(constants, "HF_HUB_DISABLE_XET", True),
        patch.object(constants, "HF_HUB_OFFLINE", False),
        patch.dict(os.environ, {"HF_TOKEN": TOKEN}),
    ):
        yield
