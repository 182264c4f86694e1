"""Drives a backend without the engine: prompts of random ids, greedy decoding at a depth.

Backend -> seconds and logits
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np

from flashformer.backends.base import (
    Backend,
    DecodeRow,
    DecodesMany,
    Float32,
    Int32,
    StepBatch,
    StepResult,
    TimesTokens,
)
from flashformer.errors import FlashFormerError, UsageError
from flashformer.plan.machine import Machine
from flashformer.plan.pack import Progress
from flashformer.serve.benchmark.cases import Case

_SEED = 20250522  # of the random ids: the same prompt in every run


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a case."""

    seconds: float
    tokens: Int32  # [steps, batch]: what the model chose; of a prompt the one after it


def num_pages(positions: Sequence[int], machine: Machine) -> int:
    """KV pages of sequences with so many positions."""
    return sum(-(-count // machine.page_tokens) for count in positions)


@dataclass(frozen=True, slots=True)
class Steps:
    """A backend with a fixed page table: slot i owns the i-th run of pages."""

    backend: Backend
    page_table: Int32  # [max_batch, pages of a sequence]

    @classmethod
    def of(cls, backend: Backend, positions: Sequence[int] | None = None) -> Self:
        """Give every slot pages of its own for its `positions` (default: the whole context)."""
        options = backend.plan.options
        positions = positions or [options.context] * options.max_batch
        counts = [num_pages([count], backend.plan.machine) for count in positions]
        table = np.full((len(counts), max(counts)), -1, np.int32)
        for slot, count in enumerate(counts):
            table[slot, :count] = sum(counts[:slot]) + np.arange(count)
        return cls(backend, table)

    def random_ids(self, count: int, slot: int = 0) -> Int32:
        """`count` token ids, the same ones at every call for the same slot."""
        rng = np.random.default_rng((_SEED, slot))
        return rng.integers(0, self.backend.plan.spec.vocab_size, count, dtype=np.int32)

    def rows(self, ids: Int32, positions: Int32, slots: Int32, logit_rows: Int32) -> StepResult:
        """One step of the backend."""
        return self.backend.step(StepBatch(ids, positions, slots, self.page_table, logit_rows))

    def prompt(self, slot: int, start: int, ids: Int32, want_logits: bool = True) -> StepResult:
        """Run a prompt from position `start` in chunks; logits of its last token alone."""
        machine = self.backend.plan.machine
        result, first = None, 0
        while first < len(ids):
            part = ids[first : first + machine.chunk_rows(start + first)]
            last = want_logits and first + len(part) >= len(ids)
            positions = np.arange(start + first, start + first + len(part), dtype=np.int32)
            wanted = [len(part) - 1] if last else []
            slots = np.full(len(part), slot, np.int32)
            result = self.rows(part, positions, slots, np.array(wanted, np.int32))
            first += len(part)
        assert result is not None
        return result

    def decode(self, ids: Int32, position: int, slots: Int32) -> StepResult:
        """One token of each of `slots`, all at `position`; logits of every row."""
        positions = np.full(len(slots), position, np.int32)
        return self.rows(ids, positions, slots, np.arange(len(slots), dtype=np.int32))

    def fill(self, depths: Sequence[int], progress: Progress) -> None:
        """Give each slot so many positions of real keys and values."""
        for slot, depth in enumerate(depths):
            progress("filling contexts", slot, len(depths))
            if depth:
                self.prompt(slot, 0, self.random_ids(depth, slot), want_logits=False)

    def run(self, case: Case) -> Run:
        """Run a case; the positions before its depth must be filled."""
        if case.kind == "pp":
            ids = self.random_ids(case.tokens)
            started = time.perf_counter()
            result = self.prompt(0, case.depth, ids)
            return Run(time.perf_counter() - started, result.argmax[None].copy())
        started = time.perf_counter()
        tokens = list(self.generate(case, np.arange(case.batch, dtype=np.int32)))
        return Run(time.perf_counter() - started, np.array(tokens, np.int32))

    def generate(self, case: Case, slots: Int32) -> Iterator[Int32]:
        """The greedy tokens of some of a case's sequences, a step after the other.

        Raises `FlashFormerError` if the backend runs out of tokens: a logit is not a number.
        """
        rows = self.first_rows(case, slots)
        if isinstance(self.backend, DecodesMany):
            count = 0
            for tokens in self.backend.launch(rows, self.page_table, case.tokens):
                yield tokens
                count += 1
            if count < case.tokens:
                raise FlashFormerError(
                    f"the launch of {case.tokens} tokens ended after {count}; a logit is NaN or "
                    "infinite; please report this"
                )
            return
        ids = np.array([row.token_id for row in rows], np.int32)
        for position in range(case.depth, case.context):
            ids = self.decode(ids, position, slots).argmax.copy()
            yield ids

    def first_rows(self, case: Case, slots: Int32) -> list[DecodeRow]:
        """What a case's sequences go on from."""
        return [
            DecodeRow(int(self.random_ids(1, slot)[0]), case.depth, slot) for slot in slots.tolist()
        ]

    def token_times(self, case: Case, count: int) -> list[int]:
        """Nanoseconds between one token and the next, `count` of them, over as many launches.

        The first token of a launch has none before it and gives no number.
        """
        if not isinstance(self.backend, TimesTokens):
            raise UsageError(
                f"device {self.backend.plan.machine.kind} does not draw tokens by itself; "
                "use --device cuda"
            )
        rows = self.first_rows(case, np.arange(case.batch, dtype=np.int32))
        found: list[int] = []
        while len(found) < count:
            times = self.backend.token_times(rows, self.page_table, case.tokens)
            found += [after - before for before, after in pairwise(times)]
        return found[:count]


def copied(result: StepResult) -> Float32:
    """The logits, safe from the next step."""
    return np.array(result.logits, dtype=np.float32, copy=True)
