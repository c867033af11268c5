"""As much of W&B's server as its client asks for to begin a run, and a network that can be cut."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

RUN = {"id": "1", "displayName": "run", "project": {"name": "unet_diffusion", "entity": {"name": "me"}}}
ANSWERS = {  # to all queries at once: a client takes what it asked for
    "viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
    "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []},
    "createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []},
    "project": None,
    "model": None,
}


class WandbServer:
    """On this machine, until it is cut; `began` has the ids of the runs that were begun."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def cut(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: WandbServer

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "gzip" in self.headers.get("Content-Encoding", ""):
            content = gzip.decompress(content)
        asked = json.loads(content or b"{}")
        answer: dict[str, Any] = {"limits": {}}
        if self.path == "/graphql":
            name = asked.get("variables", {}).get("name", "")
            answer = {"data": {**ANSWERS, "upsertBucket": {"bucket": {**RUN, "name": name}, "inserted": True}}}
            self.owner.began += [name] if "UpsertBucket" in asked["query"] else []
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_GET = do_POST

    def log_message(self, *args: object) -> None:
        """Nothing is printed."""
