"""Object stores on this machine: an HTTP server that fails when it is told to, and an S3 server."""

import os
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread


class FaultyServer:
    """Serves a folder over HTTP, and does with each of its files what is next in its list of faults.

    Attributes:
        faults: for a file name what to do at each time that it is asked for: "refuse" (503), "truncate", "corrupt",
            "hang_up".
        asked: names of the files, in order.
    """

    def __init__(self, folder: Path) -> None:
        self.faults: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self.lock = Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self, directory=str(folder)))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultyServer":
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, owner: FaultyServer, *arguments, **options) -> None:
        self.owner = owner
        super().__init__(*arguments, **options)

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        with self.owner.lock:
            self.owner.asked.append(path.name)
            left = self.owner.faults.get(path.name)
            fault = left.pop(0) if left else None
        if fault is None:
            super().do_GET()
        elif fault == "refuse":
            self.send_error(503)
        elif fault == "hang_up":
            self.close_connection = True
        else:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 255
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if fault == "truncate" else content)
            self.close_connection = True


@contextmanager
def s3_server(folder: Path, monkeypatch):
    """The address of a folder's files, copied to a bucket of an S3 server."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for name in os.listdir(folder):
            if (folder / name).is_file():
                client.upload_file(str(folder / name), "bucket", f"shards/{name}")
        yield "s3://bucket/shards"
    finally:
        server.stop()
