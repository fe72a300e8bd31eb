"""A scripted application on a port of its own, in a thread: for clients that are no Python, such as a browser."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import uvicorn

from tests.support.ports import free_port
from tests.support.scripted_app import ScriptedApp


@contextlib.contextmanager
def listening(app: ScriptedApp) -> Iterator[str]:
    """Yield the URL of the application."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app.app, port=port, log_config=None, ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        app.app.state.service.gate.close()
        server.should_exit = True
        thread.join()
