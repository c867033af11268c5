"""A stand-in for the Hugging Face Hub: as much of its HTTP interface as downloads and commits of models use,
and downloads of data sets."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secretsecretsecret"


class Hub:
    """The repositories of the server, by name: the files of each commit, of which the last is main.

    Attributes:
        repositories: A list of commits for each repository; a commit has the content of each file by its path.
        private: The names of private repositories, which need the token.
        seen: The method and the path of each request.
    """

    def __init__(self):
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.seen: list[str] = []
        self.endpoint = ""

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        commits = self.repositories.setdefault(name, [])
        commits.append({**(commits[-1] if commits else {}), **files})
        return sha(name, len(commits) - 1)

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories.get(name, [])
        by_sha = {sha(name, number): files for number, files in enumerate(commits)}
        found = sha(name, len(commits) - 1) if revision == "main" else revision
        return (found, by_sha[found]) if found in by_sha else None


def sha(name: str, number: int) -> str:
    return hashlib.sha1(f"{name} {number}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get(with_body=False)

    def do_GET(self) -> None:
        self._get(with_body=True)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self._path()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "no token"}, {"X-Error-Message": "no token"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.repositories.setdefault(name, [])
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            return self._answer(200, {"url": f"{self.hub.endpoint}/{name}"})
        if path == "/api/validate-yaml":  # of a card
            return self._answer(200, {"errors": [], "warnings": []})
        parts = path.split("/")  # "", api, models, owner, name, preupload or commit, revision
        name, action = "/".join(parts[3:5]), parts[5]
        if action == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self._answer(200, {"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        files = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                 for line in lines if line["key"] == "file"}  # fmt: skip
        oid = self.hub.commit(name, files)
        return self._answer(200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid})

    def _get(self, *, with_body: bool) -> None:
        parts = self._path().split("/")
        is_api = parts[1] == "api"
        name = "/".join(parts[3:5] if is_api else parts[1:3])
        is_hidden = name in self.hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if name not in self.hub.repositories or is_hidden:
            return self._answer(404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        rest = parts[5:] if is_api else parts[3:]
        found = self.hub.files(name, rest[1] if len(rest) > 1 else "main")
        if found is None:
            return self._answer(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        if is_api and rest[:1] == ["tree"]:
            below = "".join(f"{part}/" for part in rest[2:])
            inside = {path: content for path, content in files.items() if path.startswith(below)}
            if "recursive=true" in self.path.lower():
                return self._answer(200, [_entry(path, content) for path, content in inside.items()])
            direct = {path: content for path, content in inside.items() if "/" not in path.removeprefix(below)}
            folders = {below + path.removeprefix(below).split("/")[0] for path in inside if path not in direct}
            entries = [_entry(path, content) for path, content in direct.items()]
            return self._answer(200, entries + [_folder(path) for path in sorted(folders)])
        if is_api:
            return self._answer(200, {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]})
        path = "/".join(rest[2:])
        if path not in files:
            return self._answer(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
        tag = hashlib.sha1(files[path]).hexdigest()
        self._send(200, files[path], {"X-Repo-Commit": commit, "ETag": f'"{tag}"'}, with_body=with_body)

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append(f"{self.command} {path}")
        return path.removeprefix("/datasets") if path.startswith("/datasets/") else path

    def _answer(self, status: int, content, headers=None) -> None:
        plain = {"Content-Type": "application/json", **(headers or {})}
        self._send(status, json.dumps(content).encode(), plain, with_body=self.command != "HEAD")

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _entry(path: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def _folder(path: str) -> dict[str, object]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on this machine, while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
