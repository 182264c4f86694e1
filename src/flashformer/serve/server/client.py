"""The server's way to the model: requests in, events out, whatever happens to the engine process.

`EngineClient.generate(request)` -> `GenerateEvent`s. One event loop, no locks.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from flashformer.engine.chat import ChatTemplates
from flashformer.engine.tokenizer import Tokenizer
from flashformer.plan.pack import Progress
from flashformer.serve.server import wire
from flashformer.serve.server.encoding import Encoders
from flashformer.serve.server.flight import Flight, require_room
from flashformer.serve.server.helpers import HelperPool
from flashformer.serve.server.live import LiveStats, Recorder, Slot
from flashformer.serve.server.messages import (
    GenerateEvent,
    GenerateRequest,
    Grammar,
    ModelInfo,
    RejectedError,
    ServerError,
)
from flashformer.serve.server.metrics import Metrics
from flashformer.serve.server.settings import Limits, ServeOptions
from flashformer.serve.server.supervisor import Supervisor

_SWEEP_SECONDS = 0.25
_ABORTED = ServerError(
    "the server is shutting down and ended this request.", code="server_shutting_down"
)


class EngineClient:
    """All open requests of a server, over one engine at a time.

    Requests are admitted up to a limit and told to the engine in the order of arrival. When an
    engine is lost, the next one gets every open request with the tokens that it had.
    """

    def __init__(self, options: ServeOptions, on_progress: Progress | None = None) -> None:
        self.limits: Limits = options.limits
        self.metrics = Metrics()
        self._supervisor = Supervisor(options, self, on_progress or (lambda *_: None))
        self._seed = secrets.randbits(63) if options.seed is None else options.seed
        self._next_key = 0
        self._open: dict[int, Flight] = {}  # in the order of arrival
        self._recorder = Recorder()
        self._ready: wire.Ready | None = None
        self._helpers: HelperPool | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._down: str | None = None  # why there is no engine any more
        self._encoders = Encoders()
        self.tokenizer: Tokenizer | None = None
        self.draining = False

    async def start(self) -> wire.Ready:
        """Load the model; raises `LoadError`."""
        ready = await self._supervisor.start()
        folder = Path(ready.folder)
        self.tokenizer = await asyncio.to_thread(Tokenizer.from_folder, folder)
        templates: dict[str, str] = {}
        special_tokens: dict[str, str] = {}
        if self.tokenizer is not None:
            special_tokens = self.tokenizer.special_tokens
            templates = ChatTemplates.from_folder(
                folder, self.tokenizer.config, special_tokens
            ).templates
        info = ready.info
        setup = wire.Setup(
            templates, special_tokens, ready.folder, info.vocab_size, info.eos_token_ids
        )
        self._helpers = HelperPool(setup, self.limits)
        await self._helpers.start()
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())
        return ready

    async def close(self) -> None:
        """End every request and every process."""
        self.abort_all()
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._helpers is not None:
            await self._helpers.close()
        self._encoders.close()
        await self._supervisor.close()

    @property
    def info(self) -> ModelInfo:
        """What the model is; `ServerError` while it is being loaded."""
        if self._ready is None:
            raise ServerError("the model is being loaded.", code="loading", retry_after=2)
        return self._ready.info

    @property
    def is_loaded(self) -> bool:
        """Whether `info` is known."""
        return self._ready is not None

    @property
    def state(self) -> str:
        """One of: loading, ready, restarting, down, draining, closed."""
        ready = self._supervisor.state == "ready"
        return "draining" if self.draining and ready else self._supervisor.state

    @property
    def is_ready(self) -> bool:
        """Whether a request that comes now would be served."""
        started = self._sweeper is not None
        return started and self._supervisor.is_ready and not self.draining

    @property
    def is_dead(self) -> bool:
        """Whether only a restart of the server can help."""
        return self._down is not None

    @property
    def engine_pid(self) -> int | None:
        """The engine's process."""
        return self._supervisor.pid

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent]:
        """The events of a request, in order; closing the iterator ends it within one step.

        Raises `RejectedError` for a request that can never run and `ServerError` for one that
        cannot run now or was ended by the server.
        """
        async with aclosing(self.batches(request)) as batches:
            async for batch in batches:
                for event in batch:
                    yield event

    async def batches(self, request: GenerateRequest) -> AsyncGenerator[list[GenerateEvent]]:
        """As `generate`, with everything that is there at once."""
        flight = self._admit(request)
        try:
            if request.grammar is not None:
                await self._check_grammar(request.grammar)
            self._submit(flight)
            while not flight.exhausted:
                yield await flight.next_batch()
        finally:
            self._close(flight)

    async def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a conversation; the template runs in a process that can be killed."""
        if self._helpers is None:
            raise ServerError("the model is being loaded.", code="loading", retry_after=2)
        text = await self._helpers.render(
            wire.Render(
                list(messages),
                None if tools is None else list(tools),
                add_generation_prompt,
                continue_final_message,
                None if template_kwargs is None else dict(template_kwargs),
            )
        )
        return await self.tokenize(text, add_special_tokens=False)

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text."""
        return await self._encoders.encode(
            self._tokenizer(), text, add_special_tokens=add_special_tokens
        )

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        limit = self.info.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < limit:
                raise RejectedError(
                    f"token id {token_id} is outside the model's vocabulary of {limit}.", "tokens"
                )
        return self._tokenizer().decode(token_ids, skip_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of checked token ids, special tokens included; empty without a tokenizer."""
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)

    def stats(self) -> LiveStats:
        """What the machine does right now."""
        slots = tuple(
            Slot(self._open[key].request.request_id, tokens, prompt_tokens)
            for key, tokens, prompt_tokens in self._recorder.usage.slots
            if key in self._open
        )
        return self._recorder.sum_up(
            state=self.state,
            slots=slots,
            info=None if self._ready is None else self._ready.info,
            restarts=self._supervisor.num_restarts,
        )

    async def drain(self, seconds: float) -> None:
        """Take no new requests, and wait for the open ones to end; then end the others."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while self._open and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self.abort_all()

    def abort_all(self) -> None:
        """End every open request with an error."""
        self.draining = True
        for flight in list(self._open.values()):
            flight.fail(_ABORTED)

    # What the supervisor tells.

    @property
    def is_waiting(self) -> bool:
        """Whether the engine has something to do."""
        return bool(self._open)

    def on_message(self, message: wire.Message) -> None:
        """News of requests."""
        if isinstance(message, wire.Step):
            self._on_step(message)
        elif isinstance(message, wire.Usage):
            self._on_usage(message)
        elif isinstance(message, wire.Rejected):
            flight = self._open.get(message.key)
            if flight is not None:
                code = "context_length_exceeded" if message.too_long else "invalid_value"
                flight.fail(RejectedError(message.message, message.parameter, code))

    def on_ready(self, ready: wire.Ready) -> None:
        """A new engine: tell it everything that is open."""
        self._ready = ready
        self._recorder.read_gb_s = ready.read_gb_s
        for flight in self._open.values():
            if flight.submitted and not flight.ended:
                self._submit(flight)
                self.metrics.replays.inc()

    def on_lost(self, reason: str) -> None:
        """Requests that made no step since the last loss may be what kills engines: end them."""
        self._recorder.clear()
        self.metrics.restarts.labels(reason.partition(" for ")[0]).inc()
        if "no sign of life" in reason:
            self.metrics.watchdog.inc()
        for flight in self._open.values():
            if flight.started and flight.progress_at_loss == flight.num_generated:
                flight.fail(
                    ServerError(
                        "the engine was lost twice at the same token of this request.",
                        status=500,
                        code="engine_lost",
                    )
                )
            if flight.started:
                flight.progress_at_loss = flight.num_generated

    def on_down(self, sentence: str) -> None:
        """No engine will come any more."""
        self._down = sentence
        for flight in self._open.values():
            flight.fail(ServerError(sentence, code="engine_down"))

    # Admission, news and end of a request.

    def _admit(self, request: GenerateRequest) -> Flight:
        try:
            self._check_admission(request)
        except ServerError as error:
            self.metrics.rejections.labels(error.code).inc()
            raise
        key = self._next_key
        self._next_key += max(1, len(request.prompts))  # every prompt has a seed of its own
        flight = Flight(key, request, (self._seed + key) % 2**64)
        self._open[key] = flight
        self._recorder.total_requests += 1
        return flight

    def _check_admission(self, request: GenerateRequest) -> None:
        info, limits = self.info, self.limits
        if self._down is not None:
            raise ServerError(self._down, code="engine_down")
        if self.draining:
            raise ServerError("the server is shutting down.", code="draining", retry_after=5)
        require_room(request, self._open.values(), info.max_batch, limits)

    async def _check_grammar(self, grammar: Grammar) -> None:
        assert self._helpers is not None
        await self._helpers.check(grammar)

    def _submit(self, flight: Flight) -> None:
        try:
            self._supervisor.send(flight.submit())
        except UnicodeEncodeError:  # half of a surrogate pair
            flight.fail(RejectedError("a stop string is not valid Unicode.", "stop"))

    def _close(self, flight: Flight) -> None:
        del self._open[flight.key]
        if flight.num_open:
            self._supervisor.send(wire.Cancel(flight.key))
        self.metrics.on_end(flight)

    def _on_step(self, step: wire.Step) -> None:
        now = time.monotonic()
        for key in step.started:
            flight = self._open.get(key)
            if flight is not None and not flight.started:
                flight.started = now
        touched: dict[int, Flight] = {}
        num_tokens = 0
        for key, event in step.events:
            num_tokens += len(event.token_ids)
            flight = self._open.get(key)
            if flight is not None:
                touched[key] = flight
                self._on_event(flight, event, now)
        for flight in touched.values():
            flight.wake()
        self._recorder.add(step, num_tokens)
        self.metrics.on_step(step, num_tokens)
        if step.usage is not None:
            self._on_usage(step.usage)

    def _on_usage(self, usage: wire.Usage) -> None:
        self._recorder.note_usage(usage)
        self.metrics.on_usage(usage, self.info.num_pages)

    def _on_event(self, flight: Flight, event: GenerateEvent, now: float) -> None:
        if event.finish_reason == "error" and not event.client_fault:
            self.metrics.corrupted.inc()
            if event.error and "not a number" in event.error:
                self.metrics.nonfinite.inc()
        flight.num_cached = max(flight.num_cached, event.cached_tokens)
        if event.token_ids:
            if flight.first_token == 0.0:
                flight.first_token = now
            elif len(flight.request.prompts) == 1 and event.sequence_index == 0:
                self.metrics.inter_token.observe(now - flight.last_token)
            flight.last_token = now
        flight.deliver(event)

    async def _sweep(self) -> None:
        """End requests whose time is over."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            now = time.monotonic()
            for flight in self._open.values():
                age = now - flight.arrived
                if not flight.started and age > self.limits.queue_time:
                    self._expire(flight, "queue_time", self.limits.queue_time, 503)
                elif age > self.limits.request_time:
                    self._expire(flight, "request_time", self.limits.request_time, 408)

    def _expire(self, flight: Flight, name: str, seconds: float, status: int) -> None:
        where = "in the queue" if name == "queue_time" else "running"
        if not flight.ended:
            self.metrics.rejections.labels(name).inc()
        flight.fail(
            ServerError(
                f"the request was {where} for more than {seconds:g} s.",
                status=status,
                code=name,
                retry_after=1 if status == 503 else None,
            )
        )

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            self.info  # noqa: B018 - raises while loading
            raise RejectedError(
                "the checkpoint has no tokenizer.json, so texts cannot be used; give token ids.",
                "prompt",
            )
        return self.tokenizer
