"""Drives an engine for callers that each wait for their own request, in one thread or several.

prompt ids + parameters -> `Reader`, an iterator over the request's deltas.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from flashformer.engine.engine import Engine
from flashformer.engine.sampling import SamplingParams
from flashformer.engine.sequence import Delta, Request


class Driver:
    """Whoever waits for news runs the next step; news of others is kept for them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.RLock()
        self._inboxes: dict[Request, deque[Delta]] = {}
        self._abandoned: deque[Request] = deque()
        self._stepping = False

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Held while the engine is used."""
        return self._lock

    def open(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> "Reader":
        """Queue a request; its reader must be closed."""
        with self._lock:
            request = self._engine.add(prompt_token_ids, params)
            self._inboxes[request] = deque()
            return Reader(self, request)

    def next_delta(self, request: Request) -> Delta | None:
        """The request's next news, after as many steps as that takes; None when it has ended."""
        with self._lock:
            inbox = self._inboxes.get(request)
            if inbox is None:
                return None
            while not inbox:
                if request.finished:
                    return None
                self._step()
            return inbox.popleft()

    def is_done(self, request: Request) -> bool:
        """Whether no news will come any more."""
        with self._lock:
            return request.finished and not self._inboxes.get(request)

    def abandon(self, request: Request) -> None:
        """End a request, whatever its state; a second call does nothing.

        May be called by the garbage collector in the middle of a step, which then finishes first.
        """
        self._abandoned.append(request)
        with self._lock:
            if not self._stepping:
                self._end_abandoned()

    def abandon_all(self) -> None:
        """End every open request."""
        with self._lock:
            for request in list(self._inboxes):
                self.abandon(request)

    def _step(self) -> None:
        self._stepping = True
        try:
            for delta in self._engine.step():
                if delta.request in self._inboxes:
                    self._inboxes[delta.request].append(delta)
        finally:
            self._stepping = False
            self._end_abandoned()

    def _end_abandoned(self) -> None:
        while self._abandoned:
            request = self._abandoned.popleft()
            if self._inboxes.pop(request, None) is not None:
                self._engine.cancel(request)


class Reader:
    """The deltas of one request, in order; closing it frees the request's slots at once."""

    def __init__(self, driver: Driver, request: Request) -> None:
        self._driver = driver
        self.request = request

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        delta = self._driver.next_delta(self.request)
        if delta is None:
            raise StopIteration
        return delta

    @property
    def done(self) -> bool:
        """Whether the last delta has been read."""
        return self._driver.is_done(self.request)

    def close(self) -> None:
        """Give everything back; the request ends if it had not."""
        self._driver.abandon(self.request)
