"""Runs a generation request from its body to its last byte, whatever API it belongs to.

`Exchange` + `Endpoint` -> one JSON body, or a stream of server-sent events
"""

from collections.abc import Sequence
from contextlib import aclosing

from flashformer.errors import FlashFormerError
from flashformer.serve.server.client import EngineClient
from flashformer.serve.server.endpoint import (
    ChatPrompt,
    Endpoint,
    ParsedRequest,
    Prompt,
    RequestError,
    Responder,
    TextPrompt,
)
from flashformer.serve.server.errors import Problem, problem_of, send_problem
from flashformer.serve.server.exchange import Exchange, Ticker
from flashformer.serve.server.messages import GenerateEvent, GenerateRequest


class Generation:
    """A route that generates."""

    def __init__(self, endpoint: Endpoint, client: EngineClient, ticker: Ticker) -> None:
        self._endpoint = endpoint
        self._client = client
        self._ticker = ticker

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request; the engine's slot is free one step after the client has left."""
        parsed = self._endpoint(await exchange.body(), self._client.info)
        with self._ticker.watching(exchange):
            await exchange.run(self._answer(exchange, parsed))

    async def _answer(self, exchange: Exchange, parsed: ParsedRequest) -> None:
        exchange.streaming = parsed.stream
        responder: Responder | None = None
        try:
            prompts = [await token_ids_of(self._client, prompt) for prompt in parsed.prompts]
            decode = self._client.decode
            responder = parsed.responder(prompts, decode)
            request = GenerateRequest(
                exchange.request_id,
                tuple(map(tuple, prompts)),
                parsed.params,
                parsed.grammar(prompts, decode),
            )
            if parsed.stream:
                await self._stream(exchange, request, responder)
            else:
                await self._collect(exchange, request, responder)
        except (FlashFormerError, RequestError) as error:
            problem = problem_of(error)
            if exchange.started:
                await self._break_off(exchange, responder, problem)
            else:
                await send_problem(exchange, problem)

    async def _stream(
        self, exchange: Exchange, request: GenerateRequest, responder: Responder
    ) -> None:
        """One write for all that is there: a slow client gets longer parts, not more of them."""
        first = True
        async with aclosing(self._client.batches(request)) as batches:
            async for batch in batches:
                texts = responder.begin() if first else []
                first = False
                for event in batch:
                    _require_sound(event)
                    texts += responder.add(event)
                if texts:
                    await exchange.write("".join(texts))
        await exchange.write("".join(responder.end()))
        await exchange.end_stream()

    async def _collect(
        self, exchange: Exchange, request: GenerateRequest, responder: Responder
    ) -> None:
        async with aclosing(self._client.batches(request)) as batches:
            async for batch in batches:
                for event in batch:
                    _require_sound(event)
                    responder.add(event)
        await exchange.send_json(200, responder.body())

    async def _break_off(
        self, exchange: Exchange, responder: Responder | None, problem: Problem
    ) -> None:
        """The status was 200; the stream itself must say that it failed."""
        error = RequestError(problem.status, problem.message, problem.param, problem.code)
        if responder is not None:
            await exchange.write("".join(responder.fail(error)))
        await exchange.end_stream()


def _require_sound(event: GenerateEvent) -> None:
    """A sequence that the engine gave up ends its request."""
    if event.finish_reason == "error":
        status = 400 if event.client_fault else 500
        raise RequestError(status, event.error or "the engine failed.", code="generation_failed")


async def token_ids_of(client: EngineClient, prompt: Prompt) -> Sequence[int]:
    """A prompt in any form as token ids, not yet checked against the context."""
    if isinstance(prompt, ChatPrompt):
        return await client.render_chat(
            prompt.messages,
            prompt.tools,
            add_generation_prompt=prompt.add_generation_prompt,
            continue_final_message=prompt.continue_final_message,
            template_kwargs=prompt.template_kwargs,
        )
    if isinstance(prompt, TextPrompt):
        return await client.tokenize(prompt.text, add_special_tokens=prompt.add_special_tokens)
    return prompt
