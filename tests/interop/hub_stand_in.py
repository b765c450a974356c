"""A hub in memory: the part of the Hugging Face hub's HTTP API that `huggingface_hub` asks for models.

Repositories with branches and commits, regular and large (LFS) files, tokens with and without the right to write. It
can break a connection off in the middle of a file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

WRITER, READER = "hf_may_write", "hf_may_read"  # tokens of `OWNER` and of somebody else
OWNER = "owner"
LARGE = (".safetensors", ".bin", ".png")
Files = dict[str, bytes]


@dataclass
class Repo:
    """A model repository."""

    private: bool = False
    gated: bool = False  # all see what it has, and only its owner may read it
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {message}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def oid(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    @property
    def files(self) -> Files:
        return self.commits[self.branches["main"]]


@dataclass
class Hub:
    """What the server knows, and how it misbehaves."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    large: Files = field(default_factory=dict)  # by their SHA-256
    breaks: str = ""  # the connection ends in the middle of a file of this name, or of an upload ("upload")
    requests: list[str] = field(default_factory=list)
    lock: Any = field(default_factory=Lock)

    def add(self, name: str, files: Files, *, private: bool = False) -> Repo:
        """A repository with one commit."""
        self.repos[name] = repo = Repo(private)
        repo.commit("main", files, "initial commit")
        return repo


class Refused(Exception):
    """An answer that is an error, with the hub's code and words for it."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers on a port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave together
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        size = int(self.headers.get("Content-Length") or 0)
        if self.command == "PUT" and self.hub.breaks == "upload":
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        self.body = self.rfile.read(size)
        try:
            with self.hub.lock:
                for method, pattern, reply in ROUTES:
                    if self.command in method and (found := re.fullmatch(pattern, path)):
                        return reply(self, **found.groupdict())
            raise Refused(404, message="no such route")
        except Refused as error:
            self.send({"error": error.message}, error.status, error.code, error.message)

    def send(self, told: Any, status: int = 200, code: str = "", message: str = "") -> None:
        content = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (("X-Error-Code", code), ("X-Error-Message", message)):
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def told(self) -> Any:
        return json.loads(self.body)

    @property
    def token(self) -> str | None:
        """The token that came along; one that nobody has is refused wherever it comes."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if given not in (None, WRITER, READER):
            raise Refused(401, message="Invalid credentials in Authorization header")
        return given

    def may_write(self, repo: str) -> None:
        if self.token is None:
            raise Refused(401, message="Invalid username or password.")
        if self.token != WRITER or not repo.startswith(f"{OWNER}/"):
            raise Refused(403, message=f"You don't have the rights to create a model under {repo.split('/')[0]}")

    def repo(self, name: str) -> Repo:
        repo, token = self.hub.repos.get(name), self.token
        if repo is None or (repo.private and token != WRITER):
            raise Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        return repo

    def commit(self, name: str, revision: str | None) -> tuple[str, Files]:
        repo = self.repo(name)
        oid = repo.oid(revision or "main")
        if oid is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repo.commits[oid]

    def create(self) -> None:
        name = f"{self.told.get('organization') or OWNER}/{self.told['name']}"
        self.may_write(name)
        if name in self.hub.repos:
            raise Refused(409, message="You already created this model repo")
        self.hub.add(name, {".gitattributes": b""}, private=self.told.get("visibility") == "private")
        self.send({"url": f"{self.hub.endpoint}/{name}"})

    def info(self, name: str, revision: str | None = None) -> None:
        oid, files = self.commit(name, revision)
        siblings = [{"rfilename": path} for path in files]
        self.send({"id": name, "sha": oid, "private": self.repo(name).private, "siblings": siblings})

    def branch(self, name: str, revision: str) -> None:
        self.may_write(name)
        repo = self.repo(name)
        if revision in repo.branches:
            raise Refused(409, message="Reference already exists")
        repo.branches[revision] = repo.branches["main"]
        self.send({})

    def card(self) -> None:
        front = re.match(r"---\n(.*?)\n---\n", self.told["content"], re.DOTALL)
        try:
            yaml.safe_load(front[1]) if front else None
        except yaml.YAMLError:
            told = {"errors": [{"message": "it is no YAML"}], "warnings": []}
            return self.send(told, 400)
        self.send({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        self.may_write(name)
        self.commit(name, revision)
        told = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
             "shouldIgnore": False, "oid": None}
            for file in self.told["files"]
        ]  # fmt: skip
        self.send({"files": told})

    def batch(self, name: str) -> None:
        self.may_write(name)
        objects = []
        for each in self.told["objects"]:
            place = f"{self.hub.endpoint}/large/{each['oid']}"
            is_new = each["oid"] not in self.hub.large
            objects.append(each | ({"actions": {"upload": {"href": place}}} if is_new else {}))
        self.send({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, message="the bytes are others than were announced")
        self.hub.large[oid] = self.body
        self.send({})

    def append(self, name: str, revision: str) -> None:
        self.may_write(name)
        head, *lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(self.commit(name, revision)[1])
        for line in lines:
            value = line["value"]
            is_large = line["key"] == "lfsFile"
            files[value["path"]] = self.hub.large[value["oid"]] if is_large else base64.b64decode(value["content"])
        oid = self.repo(name).commit(revision, files, head["value"]["summary"])
        url = f"{self.hub.endpoint}/{name}/commit/{oid}"
        self.send({"commitOid": oid, "commitUrl": url})

    def file(self, name: str, revision: str, path: str) -> None:
        oid, files = self.commit(name, revision)
        if self.repo(name).gated and self.token != WRITER:
            raise Refused(403, "GatedRepo", "Access to this model is restricted")
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        content = files[path]
        first = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", oid)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.breaks == path:
            self.wfile.write(content[first : (first + len(content)) // 2])
            self.close_connection = True
            return
        self.wfile.write(content[first:])


_NAME, _REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[\w.-]+)"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("POST",), "/api/repos/create", _Handler.create),
    (("GET",), f"/api/models/{_NAME}", _Handler.info),
    (("GET",), f"/api/models/{_NAME}/revision/{_REVISION}", _Handler.info),
    (("POST",), f"/api/models/{_NAME}/branch/{_REVISION}", _Handler.branch),
    (("POST",), "/api/validate-yaml", _Handler.card),
    (("POST",), f"/api/models/{_NAME}/preupload/{_REVISION}", _Handler.preupload),
    (("POST",), f"/{_NAME}.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), "/large/(?P<oid>[0-9a-f]+)", _Handler.upload),
    (("POST",), f"/api/models/{_NAME}/commit/{_REVISION}", _Handler.append),
    (("GET", "HEAD"), f"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", _Handler.file),
]
