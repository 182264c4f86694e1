"""Every route of the server.

`EngineClient` -> the list of routes: a path, its methods, and what answers
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.routing import Route

from flashformer import __version__
from flashformer.errors import FlashFormerError
from flashformer.serve.protocol import tokens
from flashformer.serve.protocol.chat import parse_chat
from flashformer.serve.protocol.completions import parse_completion
from flashformer.serve.protocol.messages import parse_count, parse_message
from flashformer.serve.protocol.responses import parse_response
from flashformer.serve.server.client import EngineClient
from flashformer.serve.server.endpoint import Endpoint, RequestError
from flashformer.serve.server.errors import problem_of, send_problem
from flashformer.serve.server.exchange import Exchange, Receive, Scope, Send, Ticker
from flashformer.serve.server.generation import Generation, token_ids_of
from flashformer.serve.server.live import model_card
from flashformer.serve.server.page import document

# What generates, by path.
ENDPOINTS: Mapping[str, Endpoint] = {
    "/v1/chat/completions": parse_chat,
    "/v1/completions": parse_completion,
    "/v1/responses": parse_response,
    "/v1/messages": parse_message,
}
Answer = Callable[[Exchange], Awaitable[None]]

_LIVE_SECONDS = 0.25  # between two pictures of the machine


class Served:
    """A function of an exchange as an ASGI application; its errors become answers."""

    def __init__(self, answer: Answer, client: EngineClient) -> None:
        self._answer = answer
        self._limits = client.limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        exchange = Exchange(scope, receive, send, self._limits)
        try:
            await self._answer(exchange)
        except (FlashFormerError, RequestError) as error:
            await send_problem(exchange, problem_of(error))


def make_routes(
    client: EngineClient, ticker: Ticker, endpoints: Mapping[str, Endpoint]
) -> list[Route]:
    """The whole API; `endpoints` are those that generate, by path."""
    small = Small(client, ticker)
    get: dict[str, Answer] = {
        "/": small.page,
        "/health": small.health,
        "/ready": small.ready,
        "/version": small.version,
        "/metrics": small.metrics,
        "/live": small.live,
        "/v1/models": small.models,
        "/v1/models/{model:path}": small.model,
    }
    post: dict[str, Answer] = {
        "/tokenize": small.tokenize,
        "/detokenize": small.detokenize,
        "/v1/messages/count_tokens": small.count_tokens,
        **{path: Generation(endpoint, client, ticker) for path, endpoint in endpoints.items()},
    }
    return [
        Route(path, Served(answer, client), methods=[method])
        for method, answers in (("GET", get), ("POST", post))
        for path, answer in answers.items()
    ]


class Small:
    """The routes that do not generate."""

    def __init__(self, client: EngineClient, ticker: Ticker) -> None:
        self._client = client
        self._ticker = ticker

    async def page(self, exchange: Exchange) -> None:
        """For people."""
        page = document()
        await exchange.send_bytes(200, page.content, page.headers)

    async def health(self, exchange: Exchange) -> None:
        """Whether a restart would help: 503 only if nothing else can."""
        dead = self._client.is_dead
        await exchange.send_json(503 if dead else 200, {"status": "dead" if dead else "ok"})

    async def ready(self, exchange: Exchange) -> None:
        """Whether a request that comes now would be served."""
        ready = self._client.is_ready
        headers = [] if ready else [(b"retry-after", b"1")]
        body = {"status": "ready" if ready else self._client.state}
        await exchange.send_json(200 if ready else 503, body, headers)

    async def version(self, exchange: Exchange) -> None:
        """Of the package."""
        await exchange.send_json(200, {"version": __version__})

    async def metrics(self, exchange: Exchange) -> None:
        """For Prometheus."""
        kind = (b"content-type", CONTENT_TYPE_LATEST.encode())
        await exchange.send_bytes(200, self._client.metrics.text(), [kind])

    async def live(self, exchange: Exchange) -> None:
        """What the model is, then the machine four times a second until the client leaves."""
        exchange.streaming = True
        with self._ticker.watching(exchange):
            await exchange.run(self._pictures(exchange))

    async def _pictures(self, exchange: Exchange) -> None:
        told = False  # what the model is
        while not self._client.draining:
            if not told and self._client.is_loaded:
                told = True
                card = json.dumps(model_card(self._client.info))
                await exchange.write(f"event: model\ndata: {card}\n\n")
            await exchange.write(f"data: {json.dumps(asdict(self._client.stats()))}\n\n")
            await asyncio.sleep(_LIVE_SECONDS)
        await exchange.end_stream()

    async def models(self, exchange: Exchange) -> None:
        """The one model."""
        await exchange.send_json(200, tokens.models_body(self._client.info))

    async def model(self, exchange: Exchange) -> None:
        """The one model by its name."""
        info = self._client.info
        name = exchange.scope["path_params"]["model"]
        if name != info.model_id:
            raise RequestError(
                404,
                f"there is no model {name[:200]!r} here; this server has {info.model_id!r}.",
                "model",
                "model_not_found",
            )
        await exchange.send_json(200, tokens.model_body(info))

    async def tokenize(self, exchange: Exchange) -> None:
        """Text or a conversation to token ids."""
        info = self._client.info
        request = tokens.parse_tokenize(await exchange.body(), info)
        token_ids = await token_ids_of(self._client, request.prompt)
        body = tokens.tokenize_body(request, token_ids, info, self._client.decode)
        await exchange.send_json(200, body)

    async def detokenize(self, exchange: Exchange) -> None:
        """Token ids to text."""
        token_ids = tokens.parse_detokenize(await exchange.body(), self._client.info)
        await exchange.send_json(200, {"prompt": self._client.detokenize(token_ids)})

    async def count_tokens(self, exchange: Exchange) -> None:
        """How long the prompt of a message would be."""
        prompt = parse_count(await exchange.body(), self._client.info)
        count = len(await token_ids_of(self._client, prompt))
        await exchange.send_json(200, {"input_tokens": count})
