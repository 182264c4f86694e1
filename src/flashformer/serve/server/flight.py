"""One open request on the server's side: what it asked for, what it has, where its news wait."""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import fields

from flashformer.serve.server import wire
from flashformer.serve.server.messages import (
    GenerateEvent,
    GenerateRequest,
    RejectedError,
    ServerError,
)
from flashformer.serve.server.settings import Limits

MAX_UNREAD_EVENTS = 8192  # that wait for a client; beyond, it is too slow to be served


class Flight:
    """A request between its admission and its end.

    The tokens are kept here, outside the engine, so that another engine can go on with them.
    """

    def __init__(self, key: int, request: GenerateRequest, seed: int) -> None:
        self.key = key
        self.request = request
        own = request.params
        self._params = {field.name: getattr(own, field.name) for field in fields(own)}
        self._params["seed"] = seed if own.seed is None else own.seed
        self._tokens: list[list[list[int]]] = [[[] for _ in range(own.n)] for _ in request.prompts]
        self._ended = [[False] * own.n for _ in request.prompts]
        self._inbox: list[GenerateEvent] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self.num_open = len(request.prompts) * own.n  # sequences that have not ended
        self.num_prompt_tokens = sum(map(len, request.prompts))
        self.num_generated = 0
        self.num_cached = 0
        self.submitted = False
        self.progress_at_loss = -1  # tokens it had when it last lost its engine
        self.finish_reason = "abort"  # of the sequence that ended last
        self.arrived = time.monotonic()
        self.started = 0.0  # got a slot
        self.first_token = 0.0
        self.last_token = 0.0

    @property
    def failed(self) -> bool:
        """Whether it ended before its time."""
        return self._error is not None

    @property
    def ended(self) -> bool:
        """Whether no news will come any more."""
        return self.failed or self.num_open == 0

    def submit(self) -> wire.Submit:
        """What the engine needs to start it, or to go on with it."""
        self.submitted = True
        resume = tuple(tuple(tuple(t) for t in prompt) for prompt in self._tokens)
        return wire.Submit(
            self.key,
            self.request.prompts,
            self._params,
            self.request.grammar,
            resume if self.num_generated else (),
        )

    def deliver(self, event: GenerateEvent) -> None:
        """Note an event and keep it for the reader, who is woken by `wake`."""
        place = (event.prompt_index, event.sequence_index)
        if self.failed or self._ended[place[0]][place[1]]:
            return
        if event.token_ids:
            self._tokens[place[0]][place[1]].extend(event.token_ids)
            self.num_generated += len(event.token_ids)
        if event.finish_reason is not None:
            self._ended[place[0]][place[1]] = True
            self.num_open -= 1
            self.finish_reason = event.finish_reason
        self._inbox.append(event)
        if len(self._inbox) > MAX_UNREAD_EVENTS:
            self.fail(
                ServerError(
                    f"the client left {MAX_UNREAD_EVENTS} events unread, so the stream was ended.",
                    status=408,
                    code="client_too_slow",
                )
            )

    def fail(self, error: Exception) -> None:
        """End it with an error, which the reader gets instead of further news."""
        if not self.ended:
            self._error = error
            self.wake()

    def wake(self) -> None:
        """Let the reader look."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next_batch(self) -> list[GenerateEvent]:
        """All news since the last call, at least one event; raises the error that ended it."""
        while not self._inbox:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        batch, self._inbox = self._inbox, []
        return batch

    @property
    def exhausted(self) -> bool:
        """Whether the reader has had everything."""
        return self.num_open == 0 and not self._inbox


def require_room(
    request: GenerateRequest, flights: Iterable[Flight], max_batch: int, limits: Limits
) -> None:
    """Raise for a request that asks for more than can ever wait, or for more than can wait now."""
    wanted = len(request.prompts) * request.params.n
    room = max_batch + limits.queue_sequences
    if not 1 <= wanted <= room:
        raise RejectedError(
            f"a request may ask for 1 to {room} texts (prompts times n), not {wanted}.", "n"
        )
    open_flights = list(flights)
    taken = sum(flight.num_open for flight in open_flights)
    tokens = sum(flight.num_prompt_tokens for flight in open_flights)
    if taken + wanted > room or tokens > limits.queue_tokens:
        raise ServerError(
            f"the queue is full: {taken} texts are being written or wait; try again later.",
            status=429,
            code="queue_full",
            retry_after=1,
        )
