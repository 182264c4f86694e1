"""One request and its sequences: what they have, what they may still have, when they end.

prompt ids + parameters -> `Request` with n `Sequence`s; `Delta` is the news of one step.
"""

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from flashformer.engine.constraint import Constraint
from flashformer.engine.detokenizer import Detokenizer
from flashformer.engine.logprobs import Logprob
from flashformer.engine.sampler import TokenCounts
from flashformer.engine.sampling import SamplingParams
from flashformer.engine.stop_strings import StopStrings
from flashformer.engine.tokenizer import Tokenizer

Logprobs = dict[int, Logprob]


@dataclass(slots=True)
class Times:
    """Moments of a sequence on the monotonic clock, in seconds; 0.0: not yet."""

    arrived: float = 0.0
    started: float = 0.0  # got its slot
    first_token: float = 0.0
    last_token: float = 0.0


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one sequence; the one with a `finish_reason` is its last."""

    request: "Request"
    index: int  # which of the request's n sequences
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[Logprobs, ...] = ()  # one a token, if asked for
    finish_reason: str | None = None  # stop | length | abort | error
    stop_reason: int | str | None = None  # the stop token or stop string that ended it


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and what is wanted of it."""

    number: int  # counts the engine's requests from 0
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    max_tokens: int  # what fits in the context, or what was asked for
    stop_ids: frozenset[int]  # token ids that end a sequence
    eos_ids: frozenset[int]  # those of them that are the model's own
    sequences: tuple["Sequence", ...] = ()
    prompt_logprobs: list[Logprobs | None] = field(default_factory=list)
    error: str | None = None  # why a sequence ended with finish_reason "error"

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the first sequence did not have to compute."""
        return self.sequences[0].cached_tokens


class Sequence:
    """The tokens of one continuation, and the state that turns them into text."""

    __slots__ = (
        "cached_tokens",
        "constraint",
        "counts",
        "detokenizer",
        "finish_reason",
        "index",
        "num_computed",
        "num_given",
        "request",
        "slot",
        "stop_strings",
        "times",
        "token_ids",
    )

    def __init__(
        self,
        request: Request,
        index: int,
        tokenizer: Tokenizer | None,
        constraint: Constraint | None = None,
    ) -> None:
        params = request.params
        self.request = request
        self.index = index
        self.constraint = constraint
        self.token_ids = list(request.prompt_token_ids)
        self.num_given = len(self.token_ids)  # tokens that it did not choose itself
        self.num_computed = 0  # positions whose keys and values are stored
        self.cached_tokens = 0
        self.slot = -1  # row of the page table while it runs
        self.finish_reason: str | None = None
        self.times = Times(arrived=time.monotonic())
        self.counts = TokenCounts(self.token_ids) if params.penalised else None
        self.stop_strings = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self.detokenizer: Detokenizer | None = None
        if tokenizer is not None:
            self.detokenizer = tokenizer.detokenizer(skip_special_tokens=params.skip_special_tokens)

    @property
    def num_generated(self) -> int:
        """Tokens chosen so far."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def in_prompt(self) -> bool:
        """Whether given tokens are left to compute."""
        return self.num_computed < self.num_given

    @property
    def max_positions(self) -> int:
        """Positions it will ever store: the last token is never fed back."""
        return len(self.request.prompt_token_ids) + self.request.max_tokens - 1

    @property
    def forbidden(self) -> Items[int]:
        """Token ids that would end it too early."""
        too_early = self.num_generated < self.request.params.min_tokens
        return sorted(self.request.stop_ids) if too_early else ()

    def resume(self, token_ids: Items[int]) -> None:
        """Go on behind tokens that were chosen in another life of the engine."""
        for token_id in token_ids:
            self.append(token_id, ())
        self.num_given = len(self.token_ids)

    def start(self, slot: int, cached_tokens: int) -> None:
        """Take a slot whose first `cached_tokens` positions are stored already."""
        self.slot = slot
        self.cached_tokens = self.num_computed = cached_tokens
        self.times.started = time.monotonic()

    def append(self, token_id: int, logprobs: tuple[Logprobs, ...]) -> Delta:
        """Take the chosen token: count it, decode it, and see whether it ends the sequence."""
        request, params = self.request, self.request.params
        self.token_ids.append(token_id)
        if self.counts is not None:
            self.counts.add(token_id)
        self._note_time()
        reason: str | None = None
        stop: int | str | None = None
        if token_id in request.stop_ids:
            reason = "stop"
            stop = None if token_id in request.eos_ids else token_id
        elif self._completes(token_id):
            reason = "stop"
        elif self.num_generated >= request.max_tokens:
            reason = "length"
        hidden = token_id in request.stop_ids and not params.include_stop_str_in_output
        text, matched = self._text(None if hidden else token_id, final=reason is not None)
        if matched is not None:
            reason, stop = "stop", matched
        self.finish_reason = reason
        return Delta(request, self.index, (token_id,), text, logprobs, reason, stop)

    def end(self, reason: str) -> Delta:
        """End it without another token; unless it failed, with the text held back."""
        text = "" if reason == "error" else self._text(None, final=True)[0]
        self.finish_reason = reason
        return Delta(self.request, self.index, text=text, finish_reason=reason)

    def _completes(self, token_id: int) -> bool:
        """Tell the constraint of a token; whether nothing may follow it."""
        if self.constraint is None:
            return False
        self.constraint.accept(token_id)
        return self.constraint.complete

    def _text(self, token_id: int | None, *, final: bool) -> tuple[str, str | None]:
        if self.detokenizer is None:
            return "", None
        piece = "" if token_id is None else self.detokenizer.add(token_id)
        if final:
            piece += self.detokenizer.finish()
        if self.num_generated <= self.request.params.min_tokens:
            return piece, None  # a stop string counts only in what follows the first min_tokens
        text, matched = self.stop_strings.add(piece)
        if final and matched is None:
            text += self.stop_strings.finish()
        return text, matched

    def _note_time(self) -> None:
        now = time.monotonic()
        if self.times.first_token == 0.0:
            self.times.first_token = now
        self.times.last_token = now
