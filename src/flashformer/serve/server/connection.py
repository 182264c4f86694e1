"""What uvicorn does not bound by itself: headers, connections, silent peers.

A subclass of uvicorn's HTTP protocol, one instance a connection.
"""

import asyncio
import json
import socket
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from flashformer.serve.server.settings import Limits

_USER_TIMEOUT_MS = 30_000  # after which the kernel gives up a peer that acknowledges nothing
_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}
_REASONS[503] = "Service Unavailable"


class LimitedConnection(HttpToolsProtocol):
    """Ends a connection whose headers are too large, too many or too slow."""

    limits: ClassVar[Limits] = Limits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first request's headers."""
        super().connection_made(transport)
        self.access_log = False  # the guard has its own, without queries
        self._head_bytes = 0
        self._in_head = True
        self._deadline: asyncio.TimerHandle | None = None
        peer = transport.get_extra_info("socket")
        if peer is not None and peer.family in (socket.AF_INET, socket.AF_INET6):
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
        if len(self.connections) > self.limits.connections:
            self._refuse(503, "too many connections; try again later", "too_many_connections")
        else:
            self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, unless the headers grow beyond their limit."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            # The names, values and separators of the largest head that is allowed, and its URL.
            if self._head_bytes > 2 * self.limits.header_bytes:
                self._refuse_head()

    def on_message_begin(self) -> None:
        """A request begins: its headers have their own time and room."""
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        self._start_clock()

    def on_url(self, url: bytes) -> None:
        """Bound the URL as the headers are bound."""
        super().on_url(url)
        if len(self.url) > self.limits.header_bytes:
            self._refuse_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Bound the headers' bytes and number."""
        super().on_header(name, value)
        size = sum(len(n) + len(v) for n, v in self.headers)
        if size > self.limits.header_bytes or len(self.headers) > self.limits.num_headers:
            self._refuse_head()

    def on_headers_complete(self) -> None:
        """Hand the request to the application, with the means to end its connection hard."""
        self._in_head = False
        self._stop_clock()
        if self.transport.is_closing():
            return
        super().on_headers_complete()
        self.scope["state"]["abort"] = self.transport.abort

    def on_body(self, body: bytes) -> None:
        """Nothing more is taken from a connection that was refused."""
        if self.cycle is not None and not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Nothing more is taken from a connection that was refused."""
        if self.cycle is not None and not self.transport.is_closing():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets the same form of answer as everything else."""
        if not self.transport.is_closing():
            self._refuse(400, "this is not a valid HTTP request", "invalid_http")

    def _start_clock(self) -> None:
        self._stop_clock()
        self._deadline = self.loop.call_later(self.limits.header_time, self._refuse_slow)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse_slow(self) -> None:
        if not self.transport.is_closing():
            self._refuse(408, "the request's headers did not come in time", "header_timeout")

    def _refuse_head(self) -> None:
        if not self.transport.is_closing():
            self._refuse(431, "the request's headers are too large", "headers_too_large")

    def _refuse(self, status: int, message: str, code: str) -> None:
        self._stop_clock()
        body: dict[str, Any] = {
            "message": message,
            "type": "invalid_request_error" if status < 500 else "server_error",
            "param": None,
            "code": code,
        }
        content = json.dumps({"error": body}).encode()
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\nconnection: close\r\n"
        )
        if status == 503:
            head += "retry-after: 1\r\n"
        self.transport.write(head.encode() + b"\r\n" + content)
        self.transport.close()
