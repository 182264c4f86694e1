"""Keeps an engine process running: starts it, watches it, starts another one when it is lost.

`Supervisor.start` -> the loaded model; afterwards its owner hears of every message and every loss.
"""

import asyncio
import os
import signal
import time
from collections import deque
from collections.abc import Coroutine
from typing import Any, Protocol

import msgspec

from flashformer.errors import FlashFormerError
from flashformer.plan.pack import Progress
from flashformer.serve.server import wire
from flashformer.serve.server.child import Child, start_child
from flashformer.serve.server.settings import ServeOptions

MODULE = "flashformer.serve.server.worker"
PING_SECONDS = 10.0
READY_SECONDS = 30.0  # a sign of life older than this is none
_WATCH_SECONDS = 0.25
_DUMP_SECONDS = 0.2  # for the stacks of a hung engine to be written


class LoadError(FlashFormerError):
    """The engine process could not load the model; kind and exit code are its error's."""

    def __init__(self, kind: str, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.kind = kind
        self.exit_code = exit_code


class Owner(Protocol):
    """Who uses the engine."""

    @property
    def is_waiting(self) -> bool:
        """Whether news must come, because the engine has something to do."""
        ...

    def on_message(self, message: wire.Message) -> None:
        """News of requests."""
        ...

    def on_lost(self, reason: str) -> None:
        """The engine is gone, with everything that it was doing."""
        ...

    def on_ready(self, ready: wire.Ready) -> None:
        """A new engine waits for requests."""
        ...

    def on_down(self, sentence: str) -> None:
        """There will be no engine any more."""
        ...


class Supervisor:
    """One engine process at a time, for as long as the server lives."""

    def __init__(
        self,
        options: ServeOptions,
        owner: Owner,
        on_progress: Progress,
    ) -> None:
        self._arguments = [msgspec.json.encode(options.load).decode(), options.name or ""]
        self._limits = options.limits
        self._owner = owner
        self._on_progress = on_progress
        self._child: Child | None = None
        self._loaded: asyncio.Future[wire.Ready] | None = None
        self._losses: deque[float] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_proof = 0.0  # that it computes
        self._waiting_since = 0.0  # for news; 0.0: none is due
        self._pinged = False
        self._reason = "died"
        self.state = "loading"  # loading | ready | restarting | down | closed
        self.num_restarts = 0

    @property
    def pid(self) -> int | None:
        """The engine's process."""
        return self._child.pid if self._child is not None else None

    @property
    def is_ready(self) -> bool:
        """Whether the model is loaded and has computed a right token lately."""
        return self.state == "ready" and time.monotonic() - self._last_proof < READY_SECONDS

    async def start(self) -> wire.Ready:
        """Load the model; `LoadError` if that is impossible."""
        ready = await self._launch()
        self._spawn(self._watch())
        return ready

    def send(self, message: wire.Message) -> None:
        """Tell the engine; dropped if there is none, for the next one is told everything."""
        if self._child is not None and self.state == "ready":
            self._child.link.send(message)

    async def close(self) -> None:
        """End the engine and wait until it is gone."""
        self.state = "closed"
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._child is not None:
            self._child.kill()
            await self._child.reap()

    async def _launch(self) -> wire.Ready:
        self._loaded = asyncio.get_running_loop().create_future()
        self._reason = "died"
        self._child = await start_child(MODULE, self._arguments, self._hear, self._hang_up)
        ready = await self._loaded
        self._last_proof = time.monotonic()
        self._waiting_since = 0.0
        self._pinged = False
        self.state = "ready"
        self._owner.on_ready(ready)
        return ready

    def _hear(self, message: wire.Message) -> None:
        self._waiting_since = 0.0
        if isinstance(message, wire.Step):
            self._last_proof = time.monotonic()
            self._owner.on_message(message)
        elif isinstance(message, wire.Pong):
            self._pinged = False
            if message.correct:
                self._last_proof = time.monotonic()
            else:
                self._kill("gave a wrong token in its self-test")
        elif isinstance(message, wire.Loading):
            self._on_progress(message.what, message.done, message.total)
        elif isinstance(message, wire.Ready):
            self._settle(message)
        elif isinstance(message, wire.Failed):
            self._settle(LoadError(message.kind, message.message, message.exit_code))
        else:
            self._owner.on_message(message)

    def _settle(self, outcome: wire.Ready | LoadError) -> None:
        if self._loaded is None or self._loaded.done():
            return
        if isinstance(outcome, LoadError):
            self._loaded.set_exception(outcome)
        else:
            self._loaded.set_result(outcome)

    def _hang_up(self) -> None:
        """The socket closed: the engine is gone or about to be."""
        was_ready = self.state == "ready"
        self._settle(LoadError("EngineError", "the engine process died while it loaded.", 1))
        if was_ready:
            self.state = "restarting"
            self._owner.on_lost(self._reason)
            self._spawn(self._restart())

    async def _restart(self) -> None:
        while True:
            await self._bury()
            now = time.monotonic()
            self._losses.append(now)
            while now - self._losses[0] > self._limits.restart_window:
                self._losses.popleft()
            if len(self._losses) > self._limits.max_restarts:
                self.state = "down"
                self._owner.on_down(
                    f"the engine was lost {len(self._losses)} times in "
                    f"{self._limits.restart_window:.0f} s and is not started again; "
                    "the server's log says why. Restart the server."
                )
                return
            self.num_restarts += 1
            try:
                await self._launch()
                return
            except LoadError:
                continue

    async def _bury(self) -> None:
        """Make sure that the old process is gone: its memory is needed."""
        if self._child is None:
            return
        self._child.kill()
        await self._child.reap()
        self._child = None

    def _kill(self, reason: str) -> None:
        self._reason = reason
        if self._child is not None:
            self._child.process.kill()

    async def _watch(self) -> None:
        """Kill an engine that has work and says nothing; ask an idle one to prove that it lives."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            if self.state != "ready" or self._child is None:
                continue
            now = time.monotonic()
            if not self._owner.is_waiting and not self._pinged:
                self._waiting_since = 0.0
            elif self._waiting_since == 0.0:
                self._waiting_since = now
            elif now - self._waiting_since > self._limits.step_time:
                os.kill(self._child.pid, signal.SIGUSR1)
                await asyncio.sleep(_DUMP_SECONDS)
                self._waiting_since = 0.0
                self._kill(f"gave no sign of life for {self._limits.step_time:g} s")
            if now - self._last_proof > PING_SECONDS and not self._pinged:
                self._pinged = True
                self._child.link.send(wire.Ping())

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
