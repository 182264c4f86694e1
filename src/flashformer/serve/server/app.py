"""The application: routes behind the guard.

`ServeOptions` + `EngineClient` -> ASGI app
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from starlette.routing import Router

from flashformer.serve.server.client import EngineClient
from flashformer.serve.server.endpoint import Endpoint
from flashformer.serve.server.exchange import Receive, Scope, Send, Ticker
from flashformer.serve.server.guard import Guard
from flashformer.serve.server.routes import make_routes
from flashformer.serve.server.settings import ServeOptions


def make_app(
    options: ServeOptions, client: EngineClient, endpoints: Mapping[str, Endpoint]
) -> Guard:
    """Everything that a connection meets."""
    ticker = Ticker()
    routes = make_routes(client, ticker, endpoints)

    @asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[None]:
        ticking = asyncio.get_running_loop().create_task(ticker.run())
        yield
        ticking.cancel()

    router = Router(routes, redirect_slashes=False, lifespan=lifespan)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = router  # so that a path or method that is not there raises
        await router(scope, receive, send)

    return Guard(app, options, routes)
