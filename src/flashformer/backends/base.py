"""What every backend offers the engine: a step, some rows through the whole model.

A step has up to `machine.max_rows` rows; where `machine.prompt_rows` is not 0, a prompt may have
that many beside them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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


# What a launch gives in place of a token.
NOT_A_NUMBER = -1  # a logit of the row is NaN
NOT_FINITE = -2  # the largest logit is not finite


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """How the tokens of one sequence are chosen; `engine.sampler` is the meaning of the fields."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    counts: Mapping[int, int] = field(default_factory=dict)  # of a penalised sequence: how often
    # a token was generated; 0 for those of the prompt
    bias: Mapping[int, float] = field(default_factory=dict)
    allowed_ids: tuple[int, ...] | None = None
    seed: int = 0
    index: int = 0  # which of the request's sequences
    stop_ids: tuple[int, ...] = ()  # end the launch when drawn; at most `max_stop_ids`
    min_tokens: int = 0  # in the first so many tokens of the launch the stop ids are forbidden

    @property
    def penalised(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        neutral = (1.0, 0.0, 0.0)
        return (
            self.repetition_penalty,
            self.frequency_penalty,
            self.presence_penalty,
        ) != neutral

    @property
    def biased(self) -> bool:
        """Whether something is added to logits, or tokens are masked for good."""
        return bool(self.bias) or self.allowed_ids is not None


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """A sequence that goes on by itself: its newest token, which has not been computed yet."""

    token_id: int
    position: int  # of that token
    slot: int  # row of the page table
    choice: Choice = field(default_factory=Choice)


class Launch(Protocol):
    """Tokens that the device draws while the host looks elsewhere: an iterator over the steps."""

    unless: Callable[[], bool]  # asked while the host waits for a token: whether to `stop`

    def __iter__(self) -> Iterator[Int32]:
        """Itself."""
        ...

    def __next__(self) -> Int32:
        """The next token of every row, int32 [rows], as soon as it is drawn.

        There is none after the last step, after the step in which a row drew one of its stop ids or
        had no token to draw, and some steps after `stop`. Raises what the backend raises when the
        device fails; the tokens given so far are good then, and later ones were never drawn.
        """
        ...

    def stop(self) -> None:
        """Ask the device to end, at the latest after the token that it is at; does not wait."""
        ...


@runtime_checkable
class DecodesMany(Protocol):
    """A backend that draws many tokens without the host in between."""

    max_stop_ids: int  # of a row

    def launch(self, rows: Sequence[DecodeRow], page_table: Int32, num_steps: int) -> Launch:
        """Start drawing `num_steps` tokens of each row; the page table has the pages for them.

        Until the launch has ended the backend runs nothing else and the rows' pages are its own.
        """
        ...


@runtime_checkable
class TimesTokens(Protocol):
    """A backend that can say when each token of a launch reached the host."""

    def token_times(
        self, rows: Sequence[DecodeRow], page_table: Int32, num_steps: int
    ) -> list[int]:
        """Run a launch: ns of `time.perf_counter_ns` at each token; fewer if it ends early."""
        ...


@runtime_checkable
class TimesStages(Protocol):
    """A backend that knows how long each stage of its last step took."""

    def stage_seconds(self) -> Mapping[str, float]:
        """Seconds of the last whole step by stage, in the plan's order; its layers together."""
        ...


class Timed(Backend, Protocol):
    """A backend whose kernel writes down what it does when."""

    def timeline(self) -> npt.NDArray[np.uint64]:
        """The last launch's moments (codegen/instruments.py): [num_ctas, tracks, moments, 2]."""
        ...

    def read_bandwidth(self) -> float:
        """10^9 bytes a second of the ring over the image, without work and hand-offs."""
        ...


@dataclass(frozen=True, slots=True)
class Fit:
    """What of a model fits a GPU."""

    format: str  # of the weights
    weights: int  # bytes
    past_bytes_per_token: int
    free: int  # bytes, now
    context: int  # longest, in tokens, for the batch that was asked for; 0: none
