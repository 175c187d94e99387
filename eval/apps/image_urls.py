"""Fetch images that a user names by URL."""

from __future__ import annotations

from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import Request, urlopen


MAX_BYTES = 2**27
TIMEOUT = 30  # seconds without an answer
USER_AGENT = "AmorLIP (image search and classification)"  # some servers refuse Python's own
RESERVED = "%/:=&?~+!$,;'@()*[]"


def is_url(name: str) -> bool:
    """Return whether a name is an http or https URL rather than a file."""
    return name.lower().startswith(("http://", "https://"))


def fetch(url: str) -> bytes:
    """Return the content behind an http or https URL.

    Raises:
        ValueError: it is larger than `MAX_BYTES`, or the URL is malformed.
        OSError: the server cannot be reached, or refuses.
    """
    request = Request(_encode(url), headers={"User-Agent": USER_AGENT})
    with urlopen(request, timeout=TIMEOUT) as response:
        content = response.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
    return content


def _encode(url: str) -> str:
    """Return a URL in ASCII: a domain of other letters in IDNA, a path with spaces or umlauts percent-encoded."""
    parts = urlsplit(url)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode("ascii")
    return urlunsplit((parts.scheme, host, quote(parts.path, RESERVED), quote(parts.query, RESERVED), ""))
