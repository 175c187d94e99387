"""Fixtures of the tests of evaluation and publishing."""

import pytest

from tests.helpers.hub_server import Hub, connect


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Return a Hub of this machine that the client in this process talks to, with an empty cache."""
    hub = Hub()
    connect(monkeypatch, hub, tmp_path)
    yield hub
    hub.close()
