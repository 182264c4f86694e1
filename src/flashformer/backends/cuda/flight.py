"""A launch on its way: the host reads tokens from pinned memory while the kernel draws the next."""

import time
from collections.abc import Callable
from typing import Any, Self

import torch

from flashformer.backends.base import Int32
from flashformer.errors import FlashFormerError

UNWRITTEN = -(1 << 31)
ABANDONED = -3  # abandoned of kernel/candidate.cuh
POLLS_A_QUERY = 4096  # of a token, before the driver is asked whether the launch has ended
POLL_SECONDS = 20e-6  # a sleep, so that other threads run: the system makes about 70 µs of it


class Flight:
    """The tokens of one launch, an iterator over its steps; see `Launch`.

    Every word of the ring is written once, by one CTA, and says itself whether it has been: no
    other order between host and device is needed.
    """

    def __init__(self, num_steps: int, max_rows: int, num_rows: int) -> None:
        self.ring = torch.full((num_steps, max_rows), UNWRITTEN, dtype=torch.int32).pin_memory()
        self.stop_word = torch.zeros(1, dtype=torch.int32).pin_memory()
        self._tokens = self.ring.numpy()[:, :num_rows]
        self.unless: Callable[[], bool] = lambda: False
        self.in_vain = False  # it has ended without a token, for the host had a wish
        self._step = 0
        self._ended: torch.cuda.Event | None = None
        self._check: Callable[[], None] = lambda: None

    def depart(self, stream: Any, check: Callable[[], None]) -> None:
        """The kernel was put on `stream`; `check` raises what it reported once it has ended."""
        self._ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._ended.record(stream)
        self._check = check

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Int32:
        if not self._wait():
            self.land()
            raise StopIteration
        tokens: Int32 = self._tokens[self._step].copy()
        if (tokens == ABANDONED).any():
            wanted = bool(self.stop_word[0])
            self.land()
            if wanted:
                raise StopIteration
            raise FlashFormerError("the CUDA kernel abandoned a token without saying why")
        self._step += 1
        return tokens

    def arrivals(self) -> list[int]:
        """When each token was there, in ns of `time.perf_counter_ns`: the host does nothing else.

        Waits without sleeping, to a fraction of a microsecond; ends early where the launch does.
        """
        times: list[int] = []
        while len(times) < len(self._tokens):
            polls, word = 0, self._tokens[len(times), :1]
            while word[0] == UNWRITTEN:
                polls += 1
                if polls % POLLS_A_QUERY == 0 and self._has_ended() and not self._arrived():
                    self.land()
                    return times
            times.append(time.perf_counter_ns())
            self._step = len(times)
        self.land()
        return times

    def stop(self) -> None:
        """Ask the kernel to end: with the token that it is at, or without it."""
        self.stop_word[0] = 1

    def land(self) -> None:
        """Stop, wait for the kernel's end, and raise what it has reported."""
        if self._ended is not None:
            self.stop()
            self._ended.synchronize()
            self._ended = None
            self.in_vain = bool((self._tokens[0] == ABANDONED).any())
            self._check()

    def _wait(self) -> bool:
        """Whether there is a next step, as soon as that is known."""
        if self._step == len(self._tokens):
            return False
        while not self._arrived():
            if self._has_ended():
                return self._arrived()
            if self.unless():
                self.stop()
            time.sleep(POLL_SECONDS)
        return True

    def _has_ended(self) -> bool:
        return self._ended is None or bool(self._ended.query())  # type: ignore[no-untyped-call]

    def _arrived(self) -> bool:
        return bool((self._tokens[self._step] != UNWRITTEN).all())
