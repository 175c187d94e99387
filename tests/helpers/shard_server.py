"""A web server of shards that can be slow of word: it fails, forgets ranges, or changes its files when told to."""

from __future__ import annotations

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ShardServer:
    """Serve the files of a folder.

    Args:
        folder: the folder.

    Attributes:
        address: beginning of all addresses.
        failures: number of requests for content that fail from now on.
        knows_ranges: whether parts of files are served.
        downloads: names of files in the order in which their first bytes were requested.
    """

    def __init__(self, folder: Path):
        self.folder, self.failures, self.knows_ranges = folder, 0, True
        self.downloads: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.respond(with_content=False)

            def do_GET(self):
                self.respond(with_content=True)

            def respond(self, with_content):
                file = owner.folder / self.path.strip("/")
                if not file.is_file():
                    self.send_error(404)
                    return
                if with_content and owner.failures > 0:
                    owner.failures -= 1
                    self.send_error(503)
                    return
                content = file.read_bytes()
                tag = hashlib.sha256(content).hexdigest()
                span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if with_content and (span is None or span[1] == "0"):
                    owner.downloads.append(file.name)
                is_part = span is not None and owner.knows_ranges
                part = content[int(span[1]) : int(span[2]) + 1] if is_part else content
                self.send_response(206 if is_part else 200)
                self.send_header("Content-Length", str(len(part)))
                self.send_header("ETag", tag)
                if is_part:
                    self.send_header("Content-Range", f"bytes {span[1]}-{span[2]}/{len(content)}")
                self.end_headers()
                if with_content:
                    self.wfile.write(part)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
