"""What every backend offers the engine: a step, some rows through the whole model.

A step has up to `machine.max_rows` rows; where `machine.prompt_rows` is not 0, a prompt may have
that many beside them.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from flashformer.plan.plan import Plan

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The rows of one step: a row is one token of one sequence.

    Rows of a sequence come in the order of their positions. A decode step has one row a sequence, a
    prompt chunk has many rows of one sequence; both mix freely. The key and value of every row are
    stored before any row attends, so a row sees itself and all earlier positions of its sequence.
    """

    token_ids: Int32  # [rows], 0 <= id < vocab_size
    positions: Int32  # [rows]
    slots: Int32  # [rows]: which sequence (row of page_table)
    page_table: Int32  # [max_batch, max_pages]: a slot's KV page of page_tokens positions; -1: none
    logit_rows: Int32  # [n]: rows whose logits are wanted, ascending


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gives back. Arrays may be views of backend memory, valid until the next step."""

    logits: Float32  # [n, vocab_size]
    argmax: Int32  # [n]: index of the largest logit, the lowest on a tie; -1 if the row has a NaN


class Backend(Protocol):
    """A plan made executable, with its weights and its KV pages."""

    @property
    def plan(self) -> Plan:
        """The plan it runs."""
        ...

    @property
    def num_pages(self) -> int:
        """KV pages that exist (all layers of page_tokens positions are one page)."""
        ...

    def step(self, batch: StepBatch) -> StepResult:
        """Run the rows through the model. Inputs were validated by the engine."""
        ...

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        ...


@runtime_checkable
class DecodesMany(Protocol):
    """A backend that runs many tokens without the host in between."""

    def decode(
        self, token_ids: Int32, positions: Int32, slots: Int32, page_table: Int32, num_steps: int
    ) -> Int32:
        """Greedy tokens of all rows, each fed back: int32 [num_steps, rows]."""
        ...


class Timed(Backend, Protocol):
    """A backend whose kernel writes down what it does when."""

    def timeline(self) -> npt.NDArray[np.uint64]:
        """The last launch's moments (codegen/instruments.py): [num_ctas, tracks, moments, 2]."""
        ...


@dataclass(frozen=True, slots=True)
class Fit:
    """What of a model fits a GPU."""

    format: str  # of the weights
    weights: int  # bytes
    past_bytes_per_token: int
    free: int  # bytes, now
    context: int  # longest, in tokens, for the batch that was asked for; 0: none
