"""Drives a backend without the engine: prompts of random ids, greedy decoding at a depth.

Backend -> seconds and logits
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
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
)
from flashformer.serve.benchmark.cases import Case

_SEED = 20250522  # of the random ids: the same prompt in every run


@dataclass(frozen=True, slots=True)
class Steps:
    """A backend with a fixed page table: slot i owns the i-th run of pages."""

    backend: Backend
    page_table: Int32  # [max_batch, pages of a sequence]

    @classmethod
    def of(cls, backend: Backend) -> Self:
        """Give every slot of the backend pages of its own."""
        plan = backend.plan
        pages = -(-plan.options.context // plan.machine.page_tokens)
        table = np.arange(plan.options.max_batch * pages, dtype=np.int32)
        return cls(backend, table.reshape(plan.options.max_batch, pages))

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

    def fill(self, depth: int, batch: int, progress: Callable[[str, int, int], None]) -> None:
        """Give `batch` sequences `depth` positions of real keys and values."""
        for slot in range(batch):
            progress("filling contexts", slot, batch)
            self.prompt(slot, 0, self.random_ids(depth, slot), want_logits=False)

    def run(self, case: Case) -> float:
        """Seconds that a case takes; the positions before its depth must be filled."""
        if case.kind == "pp":
            ids = self.random_ids(case.tokens)
            started = time.perf_counter()
            self.prompt(0, case.depth, ids)
            return time.perf_counter() - started
        slots = np.arange(case.batch, dtype=np.int32)
        ids = np.concatenate([self.random_ids(1, slot) for slot in range(case.batch)])
        started = time.perf_counter()
        if isinstance(self.backend, DecodesMany):
            rows = [
                DecodeRow(int(token_id), case.depth, int(slot))
                for token_id, slot in zip(ids, slots, strict=True)
            ]
            for _ in self.backend.launch(rows, self.page_table, case.tokens):
                pass
        else:
            for position in range(case.depth, case.context):
                ids = self.decode(ids, position, slots).argmax
        return time.perf_counter() - started


def copied(result: StepResult) -> Float32:
    """The logits, safe from the next step."""
    return np.array(result.logits, dtype=np.float32, copy=True)
