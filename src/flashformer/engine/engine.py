"""The engine: many requests, one step at a time; no threads, no input or output.

`add` a prompt, call `step` until `has_work` is false, read the `Delta`s.
"""

from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashformer.backends.base import NOT_A_NUMBER, Backend, StepBatch, StepResult
from flashformer.engine.constraint import Constraint
from flashformer.engine.kv_cache import KvCache
from flashformer.engine.launched import Launched
from flashformer.engine.logprobs import position_logprobs
from flashformer.engine.prompt_check import check_prompt, check_room
from flashformer.engine.sampler import Draw, sample
from flashformer.engine.sampling import SamplingParams, check_vocabulary
from flashformer.engine.sequence import Delta, Logprobs, Request, Sequence
from flashformer.engine.tokenizer import Tokenizer
from flashformer.errors import ParameterError, UsageError

Float32 = npt.NDArray[np.float32]

_NAN = "the model gave a logit that is not a number"
_NOT_FINITE = "the model's largest logit is not finite"


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of one sequence in one step."""

    sequence: Sequence
    num_rows: int
    first_logits: int  # the first of its rows whose logits are wanted; num_rows: none


class Engine:
    """Continuous batching over one backend.

    A step holds the newest token of every running sequence and at most one chunk of one prompt, so
    neighbours go on while a prompt is read. Sequences start in the order of arrival; one starts
    when a slot is free and its worst case of KV pages can be reserved, so a running sequence never
    waits. What a sequence's tokens are depends on its prompt, parameters and seed alone, never on
    its neighbours.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None = None,
        *,
        eos_token_ids: Iterable[int] | None = None,
        seed: int = 0,
        prefix_reuse: bool = True,
    ) -> None:
        """`eos_token_ids`: None takes the model's own; `seed` is that of requests without one.

        `unless` may be set later: asked while a step waits for a token that the device draws by
        itself; if it says so, the step comes back without one, as soon as the device lets it.
        """
        self.unless: Callable[[], bool] = lambda: False
        plan = backend.plan
        if plan.machine.max_rows < plan.options.max_batch:
            raise UsageError(
                f"a step of {plan.machine.max_rows} rows cannot hold {plan.options.max_batch} "
                "sequences; choose a smaller max_batch."
            )
        self._backend = backend
        self._spec = plan.spec
        self._tokenizer = tokenizer
        self.eos_token_ids = frozenset(
            plan.spec.eos_token_ids if eos_token_ids is None else eos_token_ids
        )
        self._seed = seed
        self._reuse = prefix_reuse
        self._num_requests = 0
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in the order in which they started
        self._launched: Launched | None = None
        self.context = plan.options.context
        self._machine = plan.machine
        self.kv_cache = KvCache(
            backend.num_pages, plan.machine.page_tokens, plan.options.max_batch, self.context
        )

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The sequences that hold a slot, in the order in which they started."""
        return tuple(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot or for pages."""
        return len(self._waiting)

    def check(self, prompt_token_ids: Items[int], params: SamplingParams) -> tuple[int, ...]:
        """The prompt as it will be used (an empty one becomes the bos token), or a `UsageError`."""
        prompt = check_prompt(prompt_token_ids, self._spec)
        check_vocabulary(params, self._spec.vocab_size, self.eos_token_ids)
        if params.stop and self._tokenizer is None:
            raise ParameterError(
                "stop", "needs a tokenizer, and the checkpoint has none; use stop_token_ids"
            )
        check_room(prompt, params, self.context, self.kv_cache)
        return prompt

    def add(
        self,
        prompt_token_ids: Items[int],
        params: SamplingParams,
        *,
        constraints: Items[Constraint] = (),
        resume: Items[Items[int]] = (),
    ) -> Request:
        """Queue a prompt, as n sequences that share its pages; `UsageError` if it can never run.

        `constraints`: one for each sequence, or none. `resume`: what each sequence chose before the
        engine was lost; with the same seed it goes on as if nothing had happened.
        """
        prompt = self.check(prompt_token_ids, params)
        number = self._num_requests
        room = self.context - len(prompt)
        eos_ids = frozenset() if params.ignore_eos else self.eos_token_ids
        request = Request(
            number=number,
            prompt_token_ids=prompt,
            params=params,
            seed=(self._seed + number) % 2**64 if params.seed is None else params.seed,
            max_tokens=min(room, params.max_tokens or room),
            stop_ids=eos_ids | frozenset(params.stop_token_ids),
            eos_ids=eos_ids,
        )
        forms = constraints or (None,) * params.n
        request.sequences = tuple(
            Sequence(request, index, self._tokenizer, form)
            for index, form in zip(range(params.n), forms, strict=True)
        )
        for sequence, token_ids in zip(request.sequences, resume, strict=False):
            sequence.resume(token_ids)
        self._num_requests += 1
        self._waiting.extend(s for s in request.sequences if s.finish_reason is None)
        return request

    def cancel(self, request: Request) -> list[Delta]:
        """End a request's sequences now, with finish_reason "abort".

        Nothing of it appears in later steps.
        Returns the last delta of each sequence that had not ended; an ended request gives none.
        """
        return [
            self._end(sequence, "abort")
            for sequence in request.sequences
            if sequence.finish_reason is None
        ]

    def step(self) -> list[Delta]:
        """Run the model once and return the news, in the order in which the sequences started.

        A backend that draws many tokens by itself goes on meanwhile, and a step takes the next of
        them. If the backend raises, no token is lost: the next call repeats the same rows.
        """
        news = self._collect()
        if news is not None:
            return news
        self._admit()
        self._launched = Launched.start(
            self._backend, self._running, self.kv_cache, lambda: self.unless()
        )
        if self._launched is not None:
            return self._collect() or []
        parts = self._parts()
        if not parts:
            return []
        result = self._backend.step(self._batch(parts))
        deltas: list[Delta] = []
        place = 0
        for part in parts:
            num_logits = part.num_rows - part.first_logits
            delta = self._advance(part, result, place, num_logits)
            place += num_logits
            if delta is not None:
                deltas.append(delta)
        return deltas

    def logits(self, token_ids: Items[int]) -> Float32:
        """The logits of every position, [len, vocab_size], computed beside whatever is running."""
        ids = check_prompt(token_ids, self._spec)
        if len(ids) > self.context:
            raise UsageError(
                f"{len(ids)} tokens are more than the context of {self.context}; shorten the text "
                "or load the model with a larger context."
            )
        if self._launched is not None:
            self._launched.halt()
        opened = self.kv_cache.open(ids, len(ids), reuse=False)
        if opened is None:
            raise UsageError(
                f"all slots or KV pages are in use by {self.num_running} sequences; finish or "
                "close one of them first."
            )
        slot, _ = opened
        try:
            rows = np.empty((len(ids), self._spec.vocab_size), np.float32)
            start = 0
            while start < len(ids):
                chunk = np.arange(start, min(len(ids), start + self._machine.chunk_rows(start)))
                start += len(chunk)
                self.kv_cache.extend(slot, int(chunk[-1]) + 1)
                rows[chunk] = self._backend.step(
                    StepBatch(
                        token_ids=np.asarray(ids, np.int32)[chunk],
                        positions=chunk.astype(np.int32),
                        slots=np.full(len(chunk), slot, np.int32),
                        page_table=self.kv_cache.page_table,
                        logit_rows=np.arange(len(chunk), dtype=np.int32),
                    )
                ).logits
        finally:
            self.kv_cache.close(slot)
        return rows

    def _collect(self) -> list[Delta] | None:
        """The next token of the launch on its way; None if there is none."""
        launched = self._launched
        if launched is None:
            return None
        if self._waiting and self.kv_cache.fits(*self._wishes(self._waiting[0])):
            launched.stop()
        self._launched = None  # unless it goes on: what it had drawn before an error is drawn again
        tokens = launched.next()
        if tokens is None:
            return [] if self.unless() else None
        self._launched = launched
        return [
            self._take(sequence, int(token_id))
            for sequence, token_id in zip(launched.sequences, tokens, strict=True)
            if sequence.finish_reason is None
        ]

    def _take(self, sequence: Sequence, token_id: int) -> Delta:
        """Note the token that the device has drawn for a sequence."""
        if token_id == NOT_A_NUMBER:
            return self._fail(sequence, _NAN)
        if token_id < 0:
            return self._fail(sequence, _NOT_FINITE)
        sequence.num_computed += 1
        self.kv_cache.index(sequence.slot, sequence.token_ids, sequence.num_computed)
        try:
            return self._append(sequence, token_id, ())
        except Exception as error:
            return self._fail(sequence, f"{type(error).__name__}: {error}")

    def _admit(self) -> None:
        """Start the longest waiting sequence, unless a prompt is being read or there is no room."""
        if not self._waiting or any(sequence.in_prompt for sequence in self._running):
            return
        sequence = self._waiting[0]
        opened = self.kv_cache.open(*self._wishes(sequence))
        if opened is not None:
            sequence.start(*opened)
            self._running.append(self._waiting.popleft())

    def _parts(self) -> list[_Part]:
        parts = []
        decoding = sum(not sequence.in_prompt for sequence in self._running)
        for sequence in self._running:
            if not sequence.in_prompt:
                parts.append(_Part(sequence, 1, 0))
                continue
            pending = len(sequence.token_ids) - sequence.num_computed
            num_rows = min(
                pending, self._machine.chunk_rows(sequence.num_computed, others=decoding)
            )
            wants_all = self._wants_prompt_logprobs(sequence)
            last = num_rows - 1 if num_rows == pending else num_rows
            parts.append(_Part(sequence, num_rows, 0 if wants_all else last))
        return parts

    def _wishes(self, sequence: Sequence) -> tuple[Items[int], int, bool]:
        """What a sequence asks of the cache: tokens, positions, whether to reuse a prefix."""
        # Cached positions have no logits, and logprobs of the prompt need them.
        reuse = self._reuse and not self._wants_prompt_logprobs(sequence)
        return sequence.token_ids, sequence.max_positions, reuse

    def _wants_prompt_logprobs(self, sequence: Sequence) -> bool:
        return sequence.request.params.prompt_logprobs is not None and sequence.index == 0

    def _batch(self, parts: list[_Part]) -> StepBatch:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        logit_rows: list[int] = []
        for part in parts:
            sequence, start = part.sequence, part.sequence.num_computed
            self.kv_cache.extend(sequence.slot, start + part.num_rows)
            row = len(token_ids)
            logit_rows.extend(range(row + part.first_logits, row + part.num_rows))
            token_ids.extend(sequence.token_ids[start : start + part.num_rows])
            positions.extend(range(start, start + part.num_rows))
            slots.extend([sequence.slot] * part.num_rows)
        return StepBatch(
            token_ids=np.asarray(token_ids, np.int32),
            positions=np.asarray(positions, np.int32),
            slots=np.asarray(slots, np.int32),
            page_table=self.kv_cache.page_table,
            logit_rows=np.asarray(logit_rows, np.int32),
        )

    def _advance(
        self, part: _Part, result: StepResult, place: int, num_logits: int
    ) -> Delta | None:
        """Note what a step did for one sequence; whatever fails here ends this sequence alone."""
        sequence = part.sequence
        rows = slice(place, place + num_logits)
        if (result.argmax[rows] < 0).any():
            return self._fail(sequence, _NAN)
        in_prompt = sequence.in_prompt
        first = sequence.num_computed
        sequence.num_computed += part.num_rows
        self.kv_cache.index(sequence.slot, sequence.token_ids, sequence.num_computed)
        try:
            if in_prompt and self._wants_prompt_logprobs(sequence):
                self._note_prompt_logprobs(sequence, result.logits[rows], first)
            if not num_logits or sequence.in_prompt:
                return None
            last = place + num_logits - 1
            return self._choose(sequence, result.logits[last], int(result.argmax[last]))
        except Exception as error:
            return self._fail(sequence, f"{type(error).__name__}: {error}")

    def _choose(self, sequence: Sequence, logits: Float32, argmax: int) -> Delta:
        params = sequence.request.params
        allowed = None if sequence.constraint is None else sequence.constraint.allowed()
        # Where a constraint lets only the end follow, min_tokens must not forbid it.
        forbidden = sequence.forbidden if allowed is None else ()
        if params.greedy and not params.adjusting and not forbidden and allowed is None:
            token_id = argmax if np.isfinite(logits[argmax]) else -1
        else:
            draw = Draw(sequence.request.seed, len(sequence.token_ids), sequence.index)
            token_id = sample(logits, params, draw, sequence.counts, forbidden, allowed)
        if token_id < 0 and allowed is not None and np.isfinite(logits[argmax]):
            return self._fail(sequence, "the grammar allows none of the tokens that may be chosen")
        if token_id < 0:
            return self._fail(sequence, _NOT_FINITE)
        logprobs: tuple[Logprobs, ...] = ()
        if params.logprobs is not None:
            logprobs = (position_logprobs(logits, token_id, params.logprobs, self._decode_one),)
        return self._append(sequence, token_id, logprobs)

    def _append(self, sequence: Sequence, token_id: int, logprobs: tuple[Logprobs, ...]) -> Delta:
        delta = sequence.append(token_id, logprobs)
        if delta.finish_reason is not None:
            self._release(sequence)
        return delta

    def _note_prompt_logprobs(self, sequence: Sequence, logits: Float32, first: int) -> None:
        """Row i of the chunk tells the likelihood of the token after position first + i."""
        request = sequence.request
        if first == 0:
            request.prompt_logprobs.append(None)
        for row, token_id in zip(logits, request.prompt_token_ids[first + 1 :], strict=False):
            best = request.params.prompt_logprobs or 0
            request.prompt_logprobs.append(position_logprobs(row, token_id, best, self._decode_one))

    def _decode_one(self, token_id: int) -> str:
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def _fail(self, sequence: Sequence, why: str) -> Delta:
        sequence.request.error = why
        return self._end(sequence, "error")

    def _end(self, sequence: Sequence, reason: str) -> Delta:
        if sequence.slot < 0:
            self._waiting.remove(sequence)
        else:
            self._release(sequence, keep=reason != "error")
        return sequence.end(reason)

    def _release(self, sequence: Sequence, *, keep: bool = True) -> None:
        if self._launched is not None:
            self._launched.stop()
        self.kv_cache.close(sequence.slot, keep=keep)
        sequence.slot = -1
        self._running.remove(sequence)
