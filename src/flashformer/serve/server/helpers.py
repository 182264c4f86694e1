"""The helper processes as the server uses them: one job each, a deadline, and the axe.

conversation -> prompt text; grammar -> nothing, or why it cannot be used.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any, TypeVar

from flashformer.serve.server import wire
from flashformer.serve.server.child import Child, start_child
from flashformer.serve.server.messages import Grammar, RejectedError, ServerError
from flashformer.serve.server.settings import Limits

Result = TypeVar("Result")

MODULE = "flashformer.serve.server.helper"
NUM_HELPERS = 2  # so that one conversation that never ends does not hold up the others
_START_SECONDS = 30.0
_COMPILER_SECONDS = 10.0  # for the first grammar: the tokenizer is prepared
_MAX_KNOWN = 64  # grammars that are known to compile


class Helper:
    """One process, and at most one job in it."""

    def __init__(self, setup: wire.Setup, limits: Limits) -> None:
        self._setup = setup
        self._limits = limits
        self._child: Child | None = None
        self._answer: asyncio.Future[wire.Done | None] | None = None
        self.has_compiler = False

    async def start(self) -> None:
        """Run the process until it can take a job."""
        arguments = [str(self._limits.helper_bytes)]
        self._child = await start_child(MODULE, arguments, self._hear, self._hang_up)
        self.has_compiler = False
        if await self.ask(self._setup, _START_SECONDS) is None:
            raise ServerError("a helper process does not start.", status=500, code="helper_failed")

    async def ask(self, message: wire.Message, seconds: float) -> wire.Done | None:
        """The answer; None if it did not come in time or the process died. Then it is useless."""
        if self._child is None:
            return None
        self._answer = asyncio.get_running_loop().create_future()
        self._child.link.send(message)
        try:
            return await asyncio.wait_for(self._answer, seconds)
        except TimeoutError:
            return None
        finally:
            self._answer = None

    async def kill(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.kill()
            await self._child.reap()
            self._child = None

    def _hear(self, message: wire.Message) -> None:
        if self._answer is not None and not self._answer.done() and isinstance(message, wire.Done):
            self._answer.set_result(message)

    def _hang_up(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)


class HelperPool:
    """A few helpers; a job takes one that is idle, and a helper that fails its job is replaced."""

    def __init__(self, setup: wire.Setup, limits: Limits) -> None:
        self._setup = setup
        self._limits = limits
        self._idle: asyncio.Queue[Helper] = asyncio.Queue()
        self._all: set[Helper] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._known: OrderedDict[Grammar, None] = OrderedDict()
        self.num_killed = 0

    async def start(self) -> None:
        """Start all of them."""
        for _ in range(NUM_HELPERS):
            await self._add()

    async def close(self) -> None:
        """End all of them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for helper in list(self._all):
            await helper.kill()

    async def render(self, job: wire.Render) -> str:
        """The prompt text of a conversation, or a `RejectedError`."""
        done = await self._run(job, self._limits.render_time)
        if done is None:
            raise RejectedError(
                f"the chat template did not end within {self._limits.render_time:g} s and "
                "its memory on these messages.",
                "messages",
            )
        if done.error is not None:
            raise RejectedError(done.error, done.parameter or "messages")
        return done.text

    async def check(self, grammar: Grammar) -> None:
        """Raise a `RejectedError` for a grammar that cannot be compiled within its limits."""
        if grammar in self._known:
            self._known.move_to_end(grammar)
            return
        done = await self._run(wire.CheckGrammar(grammar), self._limits.grammar_time)
        if done is None:
            raise RejectedError(
                f"the grammar was not compiled within {self._limits.grammar_time:g} s and its "
                "memory; make it simpler.",
                grammar.field,
            )
        if done.error is not None:
            raise RejectedError(done.error, grammar.field)
        self._known[grammar] = None
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)

    async def _run(self, job: wire.Message, seconds: float) -> wire.Done | None:
        """A job goes on when its client leaves: its helper is in the middle of it."""
        helper = await self._idle.get()
        return await asyncio.shield(self._spawn(self._finish(helper, job, seconds)))

    async def _finish(self, helper: Helper, job: wire.Message, seconds: float) -> wire.Done | None:
        if isinstance(job, wire.CheckGrammar) and not helper.has_compiler:
            seconds += _COMPILER_SECONDS
        try:
            done = await helper.ask(job, seconds)
        except (UnicodeEncodeError, OverflowError, RecursionError, TypeError) as error:
            done = wire.Done(error=f"cannot be used: {type(error).__name__}: {str(error)[:200]}")
        if done is None:  # late or dead
            self.num_killed += 1
            self._spawn(self._replace(helper))
        else:
            helper.has_compiler |= isinstance(job, wire.CheckGrammar)
            self._idle.put_nowait(helper)
        return done

    async def _replace(self, helper: Helper) -> None:
        self._all.discard(helper)
        await helper.kill()
        await self._add()

    def _spawn(self, coroutine: Coroutine[Any, Any, Result]) -> "asyncio.Task[Result]":
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _add(self) -> None:
        helper = Helper(self._setup, self._limits)
        self._all.add(helper)
        await helper.start()
        self._idle.put_nowait(helper)
