"""eval/apps/image_urls.py against a server on this computer."""

import threading
import urllib.error
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

from eval.apps import image_urls
from eval.apps.image_urls import fetch, is_url


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/a.png")
        else:
            self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        self.wfile.write(unquote(self.path).encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_is_url():
    assert is_url("http://a/b.png") and is_url("HTTPS://a/b.png")
    assert not any(map(is_url, ["a.png", "ftp://a/b.png", "file:///etc/passwd", "https", "http:/a"]))


@pytest.mark.parametrize("path", ["/a.png", "/a%20b.png?x=1&y=%C3%BC", "/日本 ü.png?q=ä", "/[a](b).png", "/a.png#part"])
def test_fetch_encodes_paths(server, path):
    assert fetch(server + path).decode() == unquote(path.partition("#")[0])


def test_fetch_follows_redirects_and_reports_failures(server, monkeypatch):
    assert fetch(server + "/moved") == b"/a.png"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(server + "/none")
    monkeypatch.setattr(image_urls, "MAX_BYTES", 5)
    with pytest.raises(ValueError, match="larger than"):
        fetch(server + "/a.png")


def test_domains_are_encoded():
    assert image_urls._encode("https://bücher.example/ü") == "https://xn--bcher-kva.example/%C3%BC"
