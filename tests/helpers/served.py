"""The page's server in a thread of the test's process, at a free port."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

from dmm_fast.app.server import Studio, make_server


@contextlib.contextmanager
def served(studio: Studio) -> Iterator[str]:
    """The page's address while the server runs; it ends as after Ctrl-C."""
    server, listener, address = make_server(studio, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield address
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def raw(address: str, request: str) -> str:
    """What the server answers to these very bytes; no client tidies them."""
    parts = urlsplit(address)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as line:
        line.sendall(request.encode("latin-1"))
        answer = b""
        while part := line.recv(65536):
            answer += part
    return answer.decode("latin-1")
