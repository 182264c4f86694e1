"""Runs a server from its first line to its last: bind, load, listen, drain.

`ServeOptions` -> exit code
"""

import asyncio
import contextlib
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Mapping

import uvicorn

from flashformer.errors import UsageError
from flashformer.plan.pack import Progress
from flashformer.serve.failure import EXIT_INTERRUPTED, EXIT_OK
from flashformer.serve.server import wire
from flashformer.serve.server.app import make_app
from flashformer.serve.server.child import settle
from flashformer.serve.server.client import EngineClient
from flashformer.serve.server.connection import LimitedConnection
from flashformer.serve.server.endpoint import Endpoint
from flashformer.serve.server.guard import Guard, is_loopback
from flashformer.serve.server.settings import ServeOptions

_SHORTEST_KEY = 8  # characters
_BACKLOG = 2048
_CLOSE_SECONDS = 1  # for connections to close after the last byte was written
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Server:
    """One listening socket, one engine, one event loop."""

    def __init__(
        self,
        options: ServeOptions,
        endpoints: Mapping[str, Endpoint],
        *,
        on_progress: Progress | None = None,
        on_ready: Callable[[wire.Ready, str], None] | None = None,
    ) -> None:
        """Bind the address; nothing is loaded yet. Raises `UsageError` for one that is not safe."""
        require_safe(options)
        self.options = options
        self._socket = bind(options.host, options.port)
        self.client = EngineClient(options, on_progress)
        self._on_ready = on_ready
        self._stops: list[int] = []
        self._stopping = asyncio.Event()
        self.app = make_app(options, self.client, endpoints)
        self._uvicorn = _Uvicorn(_config(options, self.app))
        self.connections = self._uvicorn.server_state.connections  # those of clients
        self.client.metrics.connections.set_function(lambda: len(self.connections))
        self.client.metrics.tasks.set_function(lambda: len(asyncio.all_tasks()))

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Drain and end; a second call ends at once."""
        self._stops.append(number)
        if len(self._stops) > 1:
            self.client.abort_all()
        self._stopping.set()

    async def run(self) -> int:
        """Serve until `stop`; the exit code. Raises `LoadError` if the model cannot be loaded."""
        raise_descriptor_limit()
        loop = asyncio.get_running_loop()
        serving = loop.create_task(self._uvicorn.serve(sockets=[self._socket]))
        loading = loop.create_task(self.client.start())
        stopping = loop.create_task(self._stopping.wait())
        try:
            await asyncio.wait({loading, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                ready = loading.result()
                if self._on_ready is not None:
                    self._on_ready(ready, self.url)
                await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
                await self.client.drain(self.options.limits.drain_time)
        finally:
            for task in (loading, stopping):
                task.cancel()
            await asyncio.gather(loading, stopping, return_exceptions=True)
            self.client.abort_all()
            self._uvicorn.should_exit = True
            await serving
            await self.client.close()
            self._socket.close()
        return EXIT_INTERRUPTED if self._stops[:1] == [signal.SIGINT] else EXIT_OK


def serve(
    options: ServeOptions,
    endpoints: Mapping[str, Endpoint],
    *,
    on_progress: Progress | None = None,
    on_ready: Callable[[wire.Ready, str], None] | None = None,
) -> int:
    """Run a server in this thread until a signal ends it."""

    def is_ready(ready: wire.Ready, url: str) -> None:
        settle()
        if on_ready is not None:
            on_ready(ready, url)

    async def main() -> int:
        server = Server(options, endpoints, on_progress=on_progress, on_ready=is_ready)
        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, server.stop, number)
        return await server.run()

    return asyncio.run(main())


def require_safe(options: ServeOptions) -> None:
    """Refuse to be reachable from other machines without a key."""
    if not options.api_keys and not is_loopback(options.host):
        raise UsageError(
            f"--host {options.host} can be reached from other machines, so a key is needed; give "
            "--api-key KEY, or --api-key auto to have one made."
        )
    for key in options.api_keys:
        if not key.isascii() or not key.isprintable() or len(key) < _SHORTEST_KEY:
            raise UsageError(
                f"an API key must be printable ASCII of at least {_SHORTEST_KEY} characters."
            )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, or the sentence that says why there is none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise UsageError(f"--host {host} is not an address ({error.strerror}).") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"{host}:{port} cannot be used ({error.strerror}); choose another --port or --host."
        ) from None
    return listener


def raise_descriptor_limit() -> None:
    """Allow as many connections as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Uvicorn(uvicorn.Server):
    """Leaves the signals to us: uvicorn would close the socket first and drain afterwards."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _config(options: ServeOptions, app: Guard) -> uvicorn.Config:
    connection = type("Connection", (LimitedConnection,), {"limits": options.limits})
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    return uvicorn.Config(
        app,
        http=connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )
