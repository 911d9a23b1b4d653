"""The operator's own door, over HTTP: /metrics for Prometheus, /healthz and /readyz for whoever runs the container.

A port of its own, since those who probe speak no TLS and have no token, and devices have no business here.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client.exposition import choose_encoder

from ..artifact.errors import UsageError
from .metrics import Metrics

MOST_READERS = 8
"""At a time; more are hung up on."""
READER_SECONDS = 5.0
"""For whoever connects, to say what they want and to take it."""


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class Ops:
    """Serves from a thread of its own until closed. ready: whether new sessions are welcome. Raises UsageError if it cannot listen."""

    def __init__(self, host: str, port: int, metrics: Metrics, ready: Callable[[], bool]) -> None:
        readers = threading.BoundedSemaphore(MOST_READERS)

        class Handler(BaseHTTPRequestHandler):
            timeout = READER_SECONDS
            server_version, sys_version = "plora-cloud", ""

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    encode, kind = choose_encoder(self.headers.get("Accept", ""))
                    self._say(200, encode(metrics.registry), kind)
                elif path == "/healthz":
                    self._say(200, b"alive\n")
                elif path == "/readyz":
                    self._say(*((200, b"ready\n") if ready() else (503, b"not ready\n")))
                else:
                    self._say(404, b"/metrics, /healthz or /readyz\n")

            def _say(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def process_request(self, request: Any, client_address: Any) -> None:
                if readers.acquire(blocking=False):
                    super().process_request(request, client_address)
                else:
                    self.shutdown_request(request)

            def process_request_thread(self, request: Any, client_address: Any) -> None:
                late = threading.Timer(READER_SECONDS, _hang_up, (request,))  # `timeout` is of each wait, not of all
                late.daemon = True
                late.start()
                try:
                    super().process_request_thread(request, client_address)
                finally:
                    late.cancel()
                    readers.release()

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # whoever hung up, or took too long

        if ":" in host:
            Server.address_family = socket.AF_INET6
        try:
            self._server = Server((host, port), Handler)
        except OSError as error:
            raise UsageError(f"--ops {host}:{port}: cannot listen there ({error.strerror})") from None
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="plora-ops", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
