"""`/v1/completions`: what a client hears.

events -> chunks of a stream, or one body
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashformer.engine.sequence import Logprobs
from flashformer.serve.protocol.asked import event, new_id, openai_error
from flashformer.serve.protocol.chat_answer import DONE, answer_usage
from flashformer.serve.protocol.logprobs import (
    completion_logprobs,
    prompt_entries,
    token_text,
)
from flashformer.serve.protocol.transcript import Transcript
from flashformer.serve.server.endpoint import Decode, RequestError
from flashformer.serve.server.messages import GenerateEvent

Positions = list[tuple[int, Logprobs | None]]


@dataclass(frozen=True, slots=True)
class CompletionHeader:
    """What a request asked for."""

    model: str
    fingerprint: str
    n: int
    num_logprobs: int | None
    echo: bool
    scoring: bool  # the prompt alone is wanted
    shows_prompt_logprobs: bool
    include_usage: bool
    usage_always: bool
    bos_token_id: int | None


class CompletionAnswer:
    """A `Responder`; choice number prompt * n + sequence."""

    def __init__(
        self,
        header: CompletionHeader,
        texts: Sequence[str | None],
        prompts: Sequence[Sequence[int]],
        decode: Decode,
    ) -> None:
        """`texts` are the prompts as they were given; None: as token ids."""
        self._header = header
        self._id = new_id("cmpl-")
        self._created = int(time.time())
        self._prompts = prompts
        self._decode = decode
        self._given = texts
        self._choices = [Transcript() for _ in range(len(prompts) * header.n)]
        self._offsets = [0] * len(self._choices)  # length of the text that logprobs have passed
        self._echoed: set[int] = set()
        self._cached: dict[int, int] = {}
        self._prompt_logprobs: dict[int, tuple[Logprobs | None, ...]] = {}

    def begin(self) -> list[str]:
        """Nothing: a choice begins with its first text."""
        return []

    def add(self, said: GenerateEvent) -> list[str]:
        """A chunk with the new text, behind one with the prompt if it is echoed."""
        place = said.prompt_index * self._header.n + said.sequence_index
        choice = self._choices[place]
        choice.add(said)
        self._cached[said.prompt_index] = said.cached_tokens
        if said.prompt_logprobs is not None:
            self._prompt_logprobs[said.prompt_index] = said.prompt_logprobs
        chunks = self._echo_of(place) if self._header.echo else []
        positions: Positions = list(zip(said.token_ids, said.logprobs, strict=False))
        text = "" if self._header.scoring else said.text
        wanted = self._header.num_logprobs is not None and not self._header.scoring
        if text or said.finish_reason is not None or (wanted and positions):
            logprobs = self._logprobs(place, positions) if wanted and positions else None
            finish = None if said.finish_reason is None else _finish_reason(choice)
            chunks.append(self._chunk(place, text, logprobs, finish))
        return chunks

    def end(self) -> list[str]:
        """The usage, if it was asked for."""
        if not self._header.include_usage:
            return [DONE]
        return [event({**self._head(), "choices": [], "usage": self._usage()}), DONE]

    def fail(self, error: RequestError) -> list[str]:
        """An error inside the stream."""
        return [event(openai_error(error)), DONE]

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [self._choice(place) for place in range(len(self._choices))]
        return {**self._head(), "choices": choices, "usage": self._usage()}

    def _choice(self, place: int) -> dict[str, Any]:
        choice = self._choices[place]
        prompt = place // self._header.n
        scoring = self._header.scoring
        text = "" if scoring else choice.text("content")
        positions: Positions = [] if scoring else list(choice.logprobs)
        if self._header.echo:
            text = self._text_of(prompt) + text
            positions = [*self._prompt_positions(prompt), *positions]
        logprobs = None
        if self._header.num_logprobs is not None:
            self._offsets[place] = 0
            logprobs = self._logprobs(place, positions)
        shown: dict[str, Any] = {
            "index": place,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": _finish_reason(choice),
            "stop_reason": choice.stop_reason,
        }
        if self._header.shows_prompt_logprobs:
            shown["prompt_logprobs"] = prompt_entries(self._prompt_logprobs.get(prompt, ()))
        return shown

    def _echo_of(self, place: int) -> list[str]:
        """The prompt, once for each choice, when its logprobs are there."""
        prompt = place // self._header.n
        if place in self._echoed:
            return []
        self._echoed.add(place)
        logprobs = None
        if self._header.num_logprobs is not None:
            logprobs = self._logprobs(place, self._prompt_positions(prompt))
        return [self._chunk(place, self._text_of(prompt), logprobs, None)]

    def _prompt_positions(self, prompt: int) -> Positions:
        token_ids = self._prompts[prompt] or [self._header.bos_token_id or 0]
        return list(zip(token_ids, self._prompt_logprobs.get(prompt, ()), strict=False))

    def _logprobs(self, place: int, positions: Positions) -> dict[str, Any]:
        texts = [
            self._decode([token_id]) if entries is None else token_text(entries[token_id])
            for token_id, entries in positions
        ]
        offset = self._offsets[place]
        self._offsets[place] = offset + sum(map(len, texts))
        return completion_logprobs(positions, self._header.num_logprobs or 0, offset, texts)

    def _text_of(self, prompt: int) -> str:
        given = self._given[prompt]
        return self._decode(self._prompts[prompt]) if given is None else given

    def _chunk(
        self, place: int, text: str, logprobs: dict[str, Any] | None, finish: str | None
    ) -> str:
        choice: dict[str, Any] = {
            "index": place,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish,
        }
        chunk = {**self._head(), "choices": [choice]}
        if self._header.usage_always:
            chunk["usage"] = self._usage()
        elif self._header.include_usage:
            chunk["usage"] = None
        return event(chunk)

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._header.model,
            "system_fingerprint": self._header.fingerprint,
        }

    def _usage(self) -> dict[str, Any]:
        usage = answer_usage(self._prompts, self._cached, self._choices)
        if self._header.scoring:
            usage.completion_tokens = 0
        return usage.openai()


def _finish_reason(choice: Transcript) -> str:
    return "length" if choice.finish_reason == "length" else "stop"
