"""A web server of shards that fails, is slow, forgets ranges, goes away or changes its files when told to."""

from __future__ import annotations

import argparse
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ShardServer:
    """Serve the files of a folder.

    Args:
        folder: the folder.
        latency: seconds before an answer begins.
        port: 0 takes any free one.

    Attributes:
        address: beginning of all addresses.
        failures: number of requests for content that fail from now on.
        corruptions: number of answers with content that have a byte changed from now on.
        knows_ranges: whether parts of files are served.
        headers: further headers of all answers, by file name.
        downloads: names of files in the order in which their first bytes were requested.
    """

    def __init__(self, folder: Path, latency: float = 0.0, port: int = 0):
        self.folder, self.latency = folder, latency
        self.failures, self.corruptions, self.knows_ranges = 0, 0, True
        self.headers: dict[str, dict[str, str]] = {}
        self.downloads: list[str] = []
        self.port = port
        self.open()
        self.address = f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Answer requests, at the same address as before."""
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), _make_handler(self))
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        """Refuse connections."""
        self.server.shutdown()
        self.server.server_close()

    def go_away(self, seconds: float) -> threading.Timer:
        """Refuse connections for some time."""
        self.close()
        timer = threading.Timer(seconds, self.open)
        timer.start()
        return timer


def _make_handler(owner: ShardServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.respond(with_content=False)

        def do_GET(self):
            self.respond(with_content=True)

        def respond(self, with_content):
            time.sleep(owner.latency)
            file = owner.folder / self.path.strip("/")
            if not file.is_file():
                self.send_error(404)
                return
            if with_content and owner.failures > 0:
                owner.failures -= 1
                self.send_error(503)
                return
            status = file.stat()
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if with_content and (span is None or span[1] == "0"):
                owner.downloads.append(file.name)
            is_part = span is not None and owner.knows_ranges
            start, end = (int(span[1]), min(int(span[2]) + 1, status.st_size)) if is_part else (0, status.st_size)
            self.send_response(206 if is_part else 200)
            self.send_header("Content-Length", str(end - start))
            self.send_header("ETag", f'"{status.st_mtime_ns:x}-{status.st_size:x}"')
            for name, value in owner.headers.get(file.name, {}).items():
                self.send_header(name, value)
            if is_part:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{status.st_size}")
            self.end_headers()
            if with_content:
                self.send_part(file, start, end)

        def send_part(self, file, start, end):
            with file.open("rb") as stream:
                stream.seek(start)
                content = bytearray(stream.read(end - start))
            if owner.corruptions > 0:
                owner.corruptions -= 1
                content[len(content) // 2] ^= 1
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    return Handler


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve the files of a folder until killed.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before an answer begins (default: 0)")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: any)")
    arguments = parser.parse_args()
    print(ShardServer(arguments.folder, arguments.latency, arguments.port).address, flush=True)
    threading.Event().wait()
