"""The process that serves: HTTP in a thread of its own, while the main thread loads, waits for signals, and drains."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import uvicorn
from starlette.types import ASGIApp

from flextron.errors import FlextronError
from flextron.serving.api.app import make_app
from flextron.serving.api.options import Access
from flextron.serving.api.service import Service

_CONNECTIONS = 2048
"""Open at once; more get 503."""
_CLOSING_SECONDS = 5
"""For answers that are complete to reach their clients, at the end."""


class HttpThread:
    """Answers HTTP at a socket, in a thread, inside the block."""

    def __init__(self, app: ASGIApp, listening: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=_CLOSING_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._listening = listening
        self._thread = threading.Thread(target=self._server.run, args=([listening],), name="flextron http", daemon=True)

    def __enter__(self) -> HttpThread:
        """Return when it answers.

        Raises:
            FlextronError: it cannot start.
        """
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise FlextronError("the HTTP server cannot start; its output says why.")
            time.sleep(0.005)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let answers end that are under way, and close."""
        self._server.should_exit = True
        self._thread.join(_CLOSING_SECONDS + 1)
        self._listening.close()


class Stopping:
    """SIGTERM and Ctrl-C: the first one drains, the second one ends the process at once."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self.is_serving = False
        """Whether there is something to drain."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take the signals inside the block."""
        before = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self._asked.is_set():
            print("stopped at once.", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self._asked.set()
        if not self.is_serving:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(0)

    def wait(self) -> None:
        """Return when the first signal has come."""
        self._asked.wait()


def serve(
    load: Callable[[], Service],
    listening: socket.socket,
    access: Access,
    *,
    drain_seconds: float,
    ready: Callable[[Service], None],
) -> None:
    """Serve until a signal comes. Requests that come while `load` works are told to wait.

    Args:
        load: returns the service, whose engine has started.
        drain_seconds: for texts that are under way to end, once a signal has come.
        ready: is called when requests are answered.
    """
    app = make_app(None, access)
    stopping = Stopping()
    with stopping.installed(), HttpThread(app, listening):
        service = load()
        app.state.service = service
        stopping.is_serving = True
        ready(service)
        stopping.wait()
        print(f"stopping: no more requests; those under way get {drain_seconds:g} s.", file=sys.stderr, flush=True)
        service.draining = True
        service.engine.stop(drain_seconds)
        service.close()
