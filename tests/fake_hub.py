"""A Hub on 127.0.0.1: as much of its protocol as huggingface_hub and transformers need, and its failures.

Repositories live in memory as commits of whole file trees. Connections can be broken at a byte.

    with FakeHub() as hub:
        hub.commit("someone/model", {"config.json": b"{}"})
        subprocess.run([...], env={**os.environ, **hub.environment(cache)})
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS_FROM_BYTES = 10_000
GATED_MESSAGE = (
    "Access to model {repo} is restricted and you are not in the authorized list. "
    "Visit {url}/{repo} to ask for access."
)
TOKEN = "hf_good"


@dataclass
class Repo:
    """Commits by hash, oldest first; branches name them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def add(self, files: Mapping[str, bytes], message: str, branch: str = "main") -> str:
        parent = self.branches.get(branch, "")
        digest = hashlib.sha1(f"{parent}{message}".encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        commit = digest.hexdigest()
        self.commits[commit] = dict(files)
        self.messages.append(message)
        self.branches[branch] = commit
        return commit

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    @property
    def files(self) -> dict[str, bytes]:
        """Files of the main branch."""
        return self.commits[self.branches["main"]]


class FakeHub:
    """The server; a context manager.

    Attributes:
        repos: by id.
        requests: method and path of every request.
        break_commit_at: close the connection after so many bytes of a commit's body.
        break_upload_at: likewise for a large file.
        break_download_at: likewise for what is sent, once per number given.
        before_commit: what others do right before the next commit arrives.
        down: ``"cut"`` breaks every connection, ``"busy"`` answers 503.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.break_commit_at: int | None = None
        self.break_upload_at: int | None = None
        self.break_download_at: list[int] = []
        self.down: str | None = None
        self.before_commit: list[Callable[[], object]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self._server.handle_error = lambda *_: None  # clients may leave as they like
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a client process with its own cache in ``home``."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
        }

    def commit(
        self, repo: str, files: Mapping[str, bytes] | Path, *, gated: bool = False, private: bool = False
    ) -> str:
        """Make a repository's next commit hold exactly ``files``, or those of a folder; returns its hash."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes()
                for path in files.rglob("*")
                if path.is_file()
            }
        entry = self.repos.setdefault(repo, Repo())
        entry.gated, entry.private = gated, private
        return entry.add(files, "commit")

    def downloads(self) -> list[str]:
        """Paths of the files that were sent."""
        return [
            path.partition("/resolve/")[2].partition("/")[2]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> FakeHub:
        return self.server.hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        self.path, self.query = parts.path, parse_qs(parts.query)
        self.hub.requests.append((self.command, self.path))
        if self.hub.down == "cut":
            return self._drop()
        if self.hub.down == "busy":
            self._body()
            return self._json({"error": "try later"}, status=503)
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, self.path)
            if match and self.command in method:
                return action(self, *(unquote(group) for group in match.groups()))
        self._body()
        return self._json({"error": "no such page"}, status=404)

    # what clients send and get

    def _body(self, break_at: int | None = None) -> bytes | None:
        """The body; None if the connection was broken while it came."""
        length = int(self.headers.get("Content-Length") or 0)
        if break_at is not None and break_at < length:
            self.rfile.read(break_at)
            self._drop()
            return None
        return self.rfile.read(length)

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, content: bytes, *, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object, *, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status=status, Content_Type="application/json", **headers)

    def _error(self, status: int, code: str, message: str) -> None:
        self._json({"error": message}, status=status, X_Error_Code=code, X_Error_Message=message)

    def _repo(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._knows_us()):
            self._error(401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _knows_us(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _commit_of(self, repo: Repo, revision: str) -> str | None:
        commit = repo.find(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # pages

    def create(self) -> None:
        body = json.loads(self._body())
        name = f"{body['organization'] or 'me'}/{body['name']}"
        if not self._knows_us():
            return self._error(401, "", "Invalid username or password.")
        if name in self.hub.repos:
            return self._json(
                {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, status=409
            )
        self.hub.repos[name] = Repo(private=body.get("visibility") == "private")
        self.hub.repos[name].add({".gitattributes": b""}, "initial commit")
        return self._json({"url": f"{self.hub.url}/{name}", "id": name})

    def validate(self) -> None:
        self._body()
        self._json({"warnings": [], "errors": []})

    def branch(self, name: str, branch: str) -> None:
        self._body()
        repo = self._repo(name)
        if repo is None:
            return None
        if branch in repo.branches:
            return self._json({"error": "exists"}, status=409)
        repo.branches[branch] = repo.branches["main"]
        return self._json({})

    def info(self, name: str, revision: str = "main") -> None:
        repo = self._repo(name)
        commit = repo and self._commit_of(repo, revision)
        if commit:
            files = [{"rfilename": path} for path in repo.commits[commit]]
            self._json(
                {
                    "id": name,
                    "modelId": name,
                    "sha": commit,
                    "siblings": files,
                    "tags": [],
                    "private": repo.private,
                }
            )

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        repo = self._repo(name)
        commit = repo and self._commit_of(repo, revision)
        if commit:
            files = {
                path: content for path, content in repo.commits[commit].items() if path.startswith(folder)
            }
            if folder and not files:
                return self._error(404, "EntryNotFound", f"{folder} does not exist")
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
                for path, content in files.items()
            ]
            self._json(entries)
        return None

    def preupload(self, name: str, revision: str) -> None:
        body = json.loads(self._body())
        repo = self._repo(name)
        commit = repo and self._commit_of(repo, revision)
        if commit:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LFS_FROM_BYTES else "regular",
                    "shouldIgnore": False,
                }
                for file in body["files"]
            ]
            self._json({"files": modes})

    def batch(self, name: str) -> None:
        body = json.loads(self._body())
        objects = []
        for item in body["objects"]:
            known = item["oid"] in self.hub.large_files
            actions = (
                {} if known else {"actions": {"upload": {"href": f"{self.hub.url}/large/{item['oid']}"}}}
            )
            objects.append({**item, **actions})
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        content = self._body(self.hub.break_upload_at)
        if content is not None:
            assert hashlib.sha256(content).hexdigest() == oid
            self.hub.large_files[oid] = content
            self._send(b"")

    def add_commit(self, name: str, revision: str) -> None:
        body = self._body(self.hub.break_commit_at)
        if body is None:
            return
        repo = self._repo(name)
        parent = repo and self._commit_of(repo, revision)
        if not parent:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(repo.commits[parent])
        message = ""
        if self.hub.before_commit:
            self.hub.before_commit.pop()()
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, repo.branches[revision]):
                    return self._error(412, "", "A commit has happened since. Please refresh and try again.")
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise AssertionError(line["key"])
        commit = repo.add(files, message, revision)
        self._json(
            {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "success": True}
        )

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        commit = repo and self._commit_of(repo, revision)
        if not commit:
            return
        if repo.gated and not self._knows_us():
            return self._error(403, "GatedRepo", GATED_MESSAGE.format(repo=name, url=self.hub.url))
        content = repo.commits[commit].get(path)
        if content is None:
            return self._json(
                {"error": "Entry not found"}, status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit
            )
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        headers = {"ETag": f'"{_blob_id(content)}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if (
            self.command == "GET"
            and self.hub.break_download_at
            and self.hub.break_download_at[0] < len(content)
        ):
            stop = self.hub.break_download_at.pop(0)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:stop])
            self.wfile.flush()
            return self._drop()
        return self._send(content[start:], status=206 if start else 200, **headers)


def _blob_id(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_NAME = r"([^/]+/[^/]+?)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", _Handler.add_commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/large/([0-9a-f]+)", _Handler.upload),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/([^/]+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)/(.+)", _Handler.tree),
    (("GET", "HEAD"), rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
