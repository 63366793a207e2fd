"""A small Hub on this machine, from which huggingface_hub itself downloads, and to which it uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import mlxsft

FIRST, SECOND = "1" * 40, "2" * 40


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a process that knows this Hub and no other, with a cache of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    root = str(Path(mlxsft.__file__).parents[1])
    ours = {"HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint, "PYTHONPATH": root, "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | ours | {"MLXSFT_CACHE": str(home / "mlxsft")}


@dataclass
class Hub:
    """A Hub's answers; `log` has every request as (method, path, Authorization)."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)  # id → commit → file → content
    branches: dict[str, str] = field(default_factory=dict)  # beside main, which is the last commit of a repository
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    endpoint: str = ""
    status: int = 200  # any other is the answer to everything
    writer: str = "hf_writer"  # the token that may write
    private: dict[str, bool] = field(default_factory=dict)  # of repositories that were made here
    uploads: dict[str, bytes] = field(default_factory=dict)  # large files by SHA-256, before a commit names them

    def resolve(self, repo: str, revision: str) -> str | None:
        commits = self.repos[repo]
        revision = list(commits)[-1] if revision == "main" else self.branches.get(revision, revision)
        return revision if revision in commits else None

    def asked_for(self, word: str) -> list[str]:
        return [path for _, path, _ in self.log if word in path]

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        if self.status != 200:
            return self.status, {"X-Error-Code": "GatedRepo"} if self.status == 403 else {}, b""
        # /api/models/ORG/NAME[/revision/REVISION], /api/models/ORG/NAME/tree/REVISION, /ORG/NAME/resolve/REVISION/FILE,
        # and the same with datasets, where the last begins with /datasets
        org, name, *rest = re.sub("^(/api)?(/models|/datasets)?/", "", path).split("/")
        verb, revision = (rest[0], unquote(rest[1])) if rest else ("revision", "main")
        repo = f"{org}/{name}"
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit = self.resolve(repo, revision)
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self.repos[repo][commit]
        if verb == "resolve":
            return self.file(files, commit, unquote("/".join(rest[2:])))
        if verb == "tree":
            return 200, {}, json.dumps([self.entry(name, data) for name, data in files.items()]).encode()
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        return 200, {}, json.dumps({"id": repo, "sha": commit, "siblings": siblings, "tags": []}).encode()

    def written(self, path: str, token: str | None, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """What a request that changes something is answered."""
        if self.status != 200:
            return self.status, {}, b""
        if token != f"Bearer {self.writer}":
            return 401, {}, b"{}"
        if path.startswith("/lfs/"):
            self.uploads[path.rpartition("/")[2]] = body
            return 200, {}, b""
        lines = [json.loads(line) for line in body.splitlines()]
        return 200, {}, json.dumps(self.reply(path, lines)).encode()

    def reply(self, path: str, lines: list[Any]) -> dict[str, Any]:
        """Of the Hub's API: https://github.com/huggingface/huggingface_hub/blob/main/src/huggingface_hub/_commit_api.py"""
        asked = lines[0]
        if path == "/api/repos/create":
            repo = f"{asked.get('organization', 'me')}/{asked['name']}"
            self.repos.setdefault(repo, {})
            self.private[repo] = asked.get("visibility") == "private" or asked.get("private") is True
            return {"url": f"{self.endpoint}/{repo}", "id": "0", "name": repo}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.endpoint}/lfs/{o['oid']}"}}} for o in asked["objects"]
            ]
            return {"transfer": "basic", "objects": objects}
        if "/preupload/" in path:
            modes = {
                f["path"]: "lfs" if f["path"].endswith((".safetensors", ".gguf")) else "regular" for f in asked["files"]
            }
            return {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
        repo, commit = re.sub("^/api/models/|/commit/main$", "", path), FIRST
        files = {}
        for line in lines[1:]:
            value = line["value"]
            small = line["key"] == "file"
            files[value["path"]] = base64.b64decode(value["content"]) if small else self.uploads[value["oid"]]
        self.repos[repo][commit] = files
        return {"commitUrl": f"{self.endpoint}/{repo}/commit/{commit}", "commitOid": commit, "hookOutput": ""}

    def file(self, files: dict[str, bytes], commit: str, name: str) -> tuple[int, dict[str, str], bytes]:
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        entry = self.entry(name, files[name])
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, files[name]

    @staticmethod
    def entry(name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub without repositories, at its endpoint."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.log.append((self.command, path, self.headers.get("Authorization")))
            status, headers, body = hub.answer(self.command, path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_POST(self) -> None:
            path, token = urlsplit(self.path).path, self.headers.get("Authorization")
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = iter(lambda: self.rfile.read(int(self.rfile.readline(), 16) + 2)[:-2], b"")
                body = b"".join(parts)
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.log.append((self.command, path, token))
            # The address of an upload is secret, and needs no token.
            status, headers, answer = hub.written(path, f"Bearer {hub.writer}" if "/lfs/" in path else token, body)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(answer))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        do_PUT = do_POST  # noqa: N815
        do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
