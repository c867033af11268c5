"""An object store on this machine, which fails when it is told to."""

import time
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape


class FaultyServer:
    """Serves a folder over HTTP, and does with each of its files what is next in its list of faults.

    It is an S3 server, too, as far as reading goes: the folders in the folder are buckets, GetObject is a plain GET of
    /bucket/key, and ListObjectsV2, which the client asks for when an object is not there, is answered.

    Attributes:
        faults: for a file name what to do at each time that it is asked for: "refuse" (503), "truncate", "corrupt",
            "hang_up", "trickle" (ten bytes a second).
        asked: names of the files, in order.
        ranges: whether parts of files are sent.
    """

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        self.ranges = ranges
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
        question = parse_qs(urlsplit(self.path).query)
        if "list-type" in question:
            return self._list_objects(question.get("prefix", [""])[0])
        path = Path(self.translate_path(self.path))
        with self.owner.lock:
            self.owner.asked.append(path.name)
            left = self.owner.faults.get(path.name)
            fault = left.pop(0) if left else None
        if fault is None and self.owner.ranges and "Range" in self.headers and path.is_file():
            self._send_range(path.read_bytes())
        elif fault is None:
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
            self.close_connection = True
            if fault == "trickle":
                with suppress(ConnectionError):  # the client has enough
                    for byte in content:
                        self.wfile.write(bytes([byte]))
                        time.sleep(0.1)
                return
            self.wfile.write(content[: len(content) // 2] if fault == "truncate" else content)

    def _send_range(self, content: bytes) -> None:
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last or len(content)) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self) -> None:
        if self.owner.ranges:
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def _list_objects(self, prefix: str) -> None:
        bucket = Path(self.translate_path(self.path))
        files = {path.relative_to(bucket).as_posix(): path for path in bucket.rglob("*") if path.is_file()}
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{path.stat().st_size}</Size></Contents>"
            for key, path in files.items()
            if key.startswith(prefix)
        )
        answer = f"<ListBucketResult>{contents}</ListBucketResult>".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
