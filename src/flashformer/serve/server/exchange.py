"""One HTTP exchange: reads a bounded body, writes one JSON body or a stream of server-sent events.

ASGI scope, receive, send -> `Exchange`. A `Ticker` keeps silent streams alive and ends stuck ones.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, MutableMapping
from typing import Any

from flashformer.serve.server.messages import ServerError
from flashformer.serve.server.settings import Limits

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]

_TICK_SECONDS = 0.5
_LINGER_BYTES = 64 << 20  # of a refused body that are read so that its client hears the answer
_LINGER_SECONDS = 2.0
_JSON = (b"content-type", b"application/json")
_SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class GoneError(Exception):
    """The client has left; nobody is there to be told anything."""


class Exchange:
    """A request and the answer to it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self._limits = limits
        self.started = False  # whether the status has been sent
        self.streaming = False  # whether the answer is a stream, or will be
        self._last_write = time.monotonic()
        self._writing_since = 0.0  # 0.0: no write waits for the client

    @property
    def request_id(self) -> str:
        """The X-Request-Id of this exchange."""
        return str(self.scope["state"]["request_id"])

    async def body(self) -> bytes:
        """The whole body; `ServerError` if it is too large or too slow."""
        limit = self._limits.body_bytes
        length = dict(self.scope["headers"]).get(b"content-length", b"0")
        if int(length) > limit:
            await self._refuse_body()
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_time):
                while True:
                    event = await self._receive()
                    if event["type"] == "http.disconnect":
                        raise GoneError
                    parts.append(event.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        break
                    if not event.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ServerError(
                f"the body did not come within {self._limits.body_time:g} s.",
                status=408,
                code="body_timeout",
            ) from None
        await self._refuse_body()
        raise AssertionError("unreachable")

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work of this exchange, and cancel it as soon as the client leaves."""
        task = asyncio.ensure_future(work)
        watch = asyncio.ensure_future(self._until_gone())
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            if not task.done():
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, GoneError):
                await task

    async def send_json(
        self, status: int, body: object, headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        """Answer with one JSON body."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        await self.send_bytes(status, content, [_JSON, *headers])

    async def send_bytes(
        self, status: int, content: bytes, headers: Iterable[tuple[bytes, bytes]]
    ) -> None:
        """Answer with one body of any type."""
        self.started = True
        length = (b"content-length", str(len(content)).encode())
        await self._write(
            {"type": "http.response.start", "status": status, "headers": [*headers, length]}
        )
        await self._write({"type": "http.response.body", "body": content})

    async def start_stream(self) -> None:
        """Send the status and headers of a stream, if they have not been sent."""
        if not self.started:
            self.started = True
            await self._write({"type": "http.response.start", "status": 200, "headers": _SSE})

    async def write(self, text: str) -> None:
        """Send a part of the stream."""
        await self.start_stream()
        await self._write({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def end_stream(self) -> None:
        """Say that the stream is complete."""
        await self._write({"type": "http.response.body", "body": b""})

    async def tick(self, now: float) -> None:
        """Called twice a second: a ping on a silent stream, an end to one that nobody reads."""
        if self._writing_since:
            if now - self._writing_since > self._limits.stall_time:
                self.abort()
        elif self.streaming and now - self._last_write > self._limits.ping_time:
            await self.write(": ping\n\n")

    def abort(self) -> None:
        """Cut the connection: what is still to be sent is lost."""
        self.scope["state"].get("abort", lambda: None)()

    async def _write(self, event: Event) -> None:
        self._last_write = self._writing_since = time.monotonic()
        try:
            await self._send(event)
        finally:
            self._writing_since = 0.0

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _refuse_body(self) -> None:
        """Take what still comes, within bounds: an answer amid an upload is often never read."""
        rest = _LINGER_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                while rest > 0:
                    event = await self._receive()
                    rest -= len(event.get("body", b""))
                    if event["type"] == "http.disconnect":
                        raise GoneError
                    if not event.get("more_body", False):
                        break
        raise ServerError(
            f"the body is larger than {self._limits.body_bytes} bytes.",
            status=413,
            code="body_too_large",
        )


class Ticker:
    """Looks at every open exchange, so that none of them needs a timer of its own."""

    def __init__(self) -> None:
        self._exchanges: set[Exchange] = set()

    @contextlib.contextmanager
    def watching(self, exchange: Exchange) -> Iterator[None]:
        """Look at this exchange while the context lasts."""
        self._exchanges.add(exchange)
        try:
            yield
        finally:
            self._exchanges.discard(exchange)

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            now = time.monotonic()
            for exchange in list(self._exchanges):
                await exchange.tick(now)


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    """The headers by their lower-case names; of several with one name the last."""
    return dict(scope["headers"])
