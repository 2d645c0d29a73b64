"""An engine's own application behind a socket, for GET requests: the environment has no server for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import urlsplit


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The URL of an ASGI application."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            scope = {
                "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
                "path": parts.path, "raw_path": parts.path.encode(), "query_string": parts.query.encode(),
                "root_path": "", "headers": [], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1), "state": {},
            }  # fmt: skip
            asyncio.run(app(scope, self._receive, self._send))

        async def _receive(self) -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def _send(self, message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.send_response(message["status"])
                self.end_headers()
            else:
                self.wfile.write(message.get("body", b""))

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
