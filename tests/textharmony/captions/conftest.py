import threading

import pytest
from chat_server import serve
from PIL import Image

from textharmony.captions.endpoint import Endpoint


@pytest.fixture(scope="session", autouse=True)
def openai_is_imported() -> None:
    """The first request imports the rest of openai, which may take longer than the timeouts of the tests."""
    with serve() as server:
        Endpoint(server.url, "m")(Image.new("RGB", (1, 1)), [("user", "")], lambda *row: None, threading.Event())
