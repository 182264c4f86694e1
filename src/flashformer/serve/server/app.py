"""The application: routes behind the guard, with one way to say what is not there.

`ServeOptions` + `EngineClient` -> ASGI app
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flashformer.serve.server.client import EngineClient
from flashformer.serve.server.endpoint import Endpoint
from flashformer.serve.server.errors import Problem
from flashformer.serve.server.exchange import Ticker
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
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        ticking = asyncio.get_running_loop().create_task(ticker.run())
        yield
        ticking.cancel()

    app = Starlette(
        routes=routes,
        exception_handlers={HTTPException: _no_route},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return Guard(app, options, routes)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        message = f"{request.method} is not possible here."
    else:
        message = "there is nothing here; the API is under /v1."
    problem = Problem(error.status_code, message, code="not_found")
    return JSONResponse(
        problem.body(request.url.path), error.status_code, headers=dict(error.headers or {})
    )
