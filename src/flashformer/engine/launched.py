"""Sequences whose tokens the device draws by itself, and the launch that draws them.

running sequences -> `Launched`, or None where the host must look at every token.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Self

from flashformer.backends.base import Backend, Choice, DecodeRow, DecodesMany, Int32, Launch
from flashformer.engine.kv_cache import KvCache
from flashformer.engine.sequence import Sequence

MAX_STEPS = 256  # tokens of a launch: starting the next costs a thousandth of their time


class Launched:
    """A launch on its way; a sequence that ends meanwhile keeps its row, whose tokens are dropped.

    The pages of its sequences are the device's until it has ended, also those given back.
    """

    def __init__(self, launch: Launch, sequences: tuple[Sequence, ...]) -> None:
        self.sequences = sequences
        self._launch = launch
        self._ahead: deque[Int32] = deque()  # drawn, but not asked for yet

    @classmethod
    def start(
        cls,
        backend: Backend,
        sequences: Items[Sequence],
        kv_cache: KvCache,
        unless: Callable[[], bool],
    ) -> Self | None:
        """Launch as many tokens as all sequences may still have; their pages are reserved.

        It ends before that when `unless` says so while the host waits for a token.
        """
        if not isinstance(backend, DecodesMany):
            return None
        choices = [choice_of(sequence, backend.max_stop_ids) for sequence in sequences]
        rows = [
            DecodeRow(sequence.token_ids[-1], sequence.num_computed, sequence.slot, choice)
            for sequence, choice in zip(sequences, choices, strict=True)
            if choice is not None
        ]
        if not rows or len(rows) < len(sequences):
            return None
        left = min(s.request.max_tokens - s.num_generated for s in sequences)
        num_steps = min(left, MAX_STEPS)
        for sequence in sequences:
            kv_cache.extend(sequence.slot, sequence.num_computed + num_steps)
        launch = backend.launch(rows, kv_cache.page_table, num_steps)
        launch.unless = unless
        return cls(launch, tuple(sequences))

    def next(self) -> Int32 | None:
        """The next token of every sequence, or None when the launch has ended."""
        return self._ahead.popleft() if self._ahead else next(self._launch, None)

    def stop(self) -> None:
        """Let it end at the next token."""
        self._launch.stop()

    def halt(self) -> None:
        """Wait for the end now; `next` still gives what was drawn."""
        self.stop()
        self._ahead.extend(self._launch)


def choice_of(sequence: Sequence, max_stop_ids: int) -> Choice | None:
    """How the device chooses for a sequence; None if it has to be asked about every token."""
    request, params = sequence.request, sequence.request.params
    must_go_on = max(0, params.min_tokens - sequence.num_generated)
    too_many = must_go_on > 0 and len(request.stop_ids) > max_stop_ids
    given_tokens_left = sequence.in_prompt
    if given_tokens_left or too_many or sequence.constraint or params.logprobs is not None:
        return None
    return Choice(
        temperature=0.0 if params.greedy else params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        counts={} if sequence.counts is None else sequence.counts.as_dict(),
        bias=params.logit_bias or {},
        allowed_ids=params.allowed_token_ids,
        seed=request.seed,
        index=sequence.index,
        stop_ids=tuple(sorted(request.stop_ids)[:max_stop_ids]),  # the engine knows them all
        min_tokens=must_go_on,
    )
