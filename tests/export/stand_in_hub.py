"""A stand-in for the hub on this machine: creating, filling, listing and downloading a repository of a model."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import ModelCard
from huggingface_hub.utils.sha import git_hash

TOKEN = "hf_write"
COMMIT = "c" * 40
NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"


class StandInHub:
    """Repositories in memory.

    Attributes:
        repos: the files of each repository by name.
        private: the repositories that were made private.
        asked: every request, as method and path.
        failures: status of the answer to a request whose method and path match this pattern; 0 drops the connection.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.asked: list[str] = []
        self.failures: dict[str, int] = {}
        self.url = ""

    def create(self, body: bytes) -> tuple[int, Any]:
        wanted = json.loads(body)
        repo = f"{wanted['organization']}/{wanted['name']}"
        if repo in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{repo}"}
        self.repos[repo] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        if wanted.get("visibility") == "private":
            self.private.add(repo)
        return 200, {"url": f"{self.url}/{repo}"}

    def tree(self, body: bytes, repo: str) -> tuple[int, Any]:
        if repo not in self.repos:
            return 404, "RepoNotFound"
        return 200, [self.entry(name, content) for name, content in self.repos[repo].items()]

    def entry(self, name: str, content: bytes) -> dict[str, Any]:
        found = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
        digest = hashlib.sha256(content).hexdigest()
        if digest in self.large:
            found["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        return found

    def validate(self, body: bytes) -> tuple[int, Any]:
        """The rules that matter: metadata that can be read, and names where names of the hub belong."""
        data = ModelCard(json.loads(body)["content"]).data.to_dict()
        bases = data.get("base_model", [])
        bad = [base for base in ([bases] if isinstance(bases, str) else bases) if not re.fullmatch(NAME, base)]
        if bad:
            return 400, {"errors": [{"message": f'"base_model" with value "{bad[0]}" is not valid'}], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def preupload(self, body: bytes, repo: str) -> tuple[int, Any]:
        if repo not in self.repos:
            return 404, "RepoNotFound"
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": files}

    def batch(self, body: bytes, repo: str) -> tuple[int, Any]:
        objects = []
        for wanted in json.loads(body)["objects"]:
            actions = {name: {"href": f"{self.url}/{name}/{wanted['oid']}"} for name in ("upload", "verify")}
            is_here = wanted["oid"] in self.large
            objects.append({"oid": wanted["oid"], "size": wanted["size"]} | ({} if is_here else {"actions": actions}))
        return 200, {"transfer": "basic", "objects": objects}

    def upload(self, body: bytes, oid: str) -> tuple[int, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "other bytes than announced"}
        self.large[oid] = body
        return 200, {}

    def verify(self, body: bytes, oid: str) -> tuple[int, Any]:
        return (200, {}) if len(self.large[oid]) == json.loads(body)["size"] else (400, {"error": "another size"})

    def commit(self, body: bytes, repo: str) -> tuple[int, Any]:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        self.repos[repo] |= files
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT, "pullRequestUrl": None}

    def info(self, body: bytes, repo: str) -> tuple[int, Any]:
        if repo not in self.repos:
            return 404, "RepoNotFound"
        siblings = [{"rfilename": name} for name in self.repos[repo]]
        return 200, {"_id": "1", "id": repo, "sha": COMMIT, "private": repo in self.private, "siblings": siblings}

    def resolve(self, body: bytes, repo: str, file: str) -> tuple[int, Any]:
        if repo not in self.repos:
            return 404, "RepoNotFound"
        return (200, self.repos[repo][file]) if file in self.repos[repo] else (404, "EntryNotFound")

    ROUTES = (
        ("POST /api/repos/create", create),
        ("POST /api/validate-yaml", validate),
        (rf"GET /api/models/{NAME}/tree/\w+", tree),
        (rf"GET /api/models/{NAME}(/revision/\w+)?", info),
        (rf"POST /api/models/{NAME}/preupload/main", preupload),
        (rf"POST /api/models/{NAME}/commit/main", commit),
        (rf"POST /{NAME}\.git/info/lfs/objects/batch", batch),
        (r"PUT /upload/(?P<oid>\w+)", upload),
        (r"POST /verify/(?P<oid>\w+)", verify),
        (rf"(GET|HEAD) /{NAME}/resolve/\w+/(?P<file>.+)", resolve),
    )

    def answer(self, request: str, body: bytes, token: str) -> tuple[int, Any]:
        for pattern, status in self.failures.items():
            if re.match(pattern, request):
                return status, {"error": "as the test wants it"}
        if token != f"Bearer {TOKEN}" and not request.startswith(("PUT /upload", "GET", "HEAD")):
            return 401, {"error": "Invalid username or password."}
        for pattern, handle in self.ROUTES:
            found = re.fullmatch(pattern, request)
            if found is not None:
                return handle(self, body, **found.groupdict())
        return 404, {"error": f"no such route: {request}"}


@contextmanager
def running() -> Iterator[StandInHub]:
    """A stand-in that answers on a free port."""
    hub = StandInHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = f"{self.command} {urlsplit(self.path).path}"
            hub.asked.append(request)
            status, said = hub.answer(request, body, self.headers.get("Authorization", ""))
            if status == 0:
                self.close_connection = True
                return
            self.send_response(status)
            if isinstance(said, str):
                self.send_header("X-Error-Code", said)
                said = {"error": said}
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            if isinstance(said, bytes):
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
