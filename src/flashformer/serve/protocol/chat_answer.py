"""`/v1/chat/completions`: what a client hears.

events -> chunks of a stream, or one body
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashformer.engine.sequence import Logprobs
from flashformer.serve.protocol.asked import call_id, event, new_id, openai_error
from flashformer.serve.protocol.logprobs import chat_logprobs, prompt_entries
from flashformer.serve.protocol.pieces import CallArguments, CallBegin, Content, Piece
from flashformer.serve.protocol.rules import AnswerRules
from flashformer.serve.protocol.transcript import Transcript
from flashformer.serve.protocol.usage import Usage, prompt_usage
from flashformer.serve.server.endpoint import Decode, RequestError
from flashformer.serve.server.messages import GenerateEvent

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class ChatHeader:
    """What is the same in all of a request's chunks."""

    model: str
    fingerprint: str
    num_logprobs: int | None
    include_usage: bool
    usage_always: bool


class ChatAnswer:
    """A `Responder`."""

    def __init__(
        self,
        header: ChatHeader,
        rules: AnswerRules,
        n: int,
        prompt: Sequence[int],
        decode: Decode,
    ) -> None:
        self._header = header
        self._id = new_id("chatcmpl-")
        self._created = int(time.time())
        self._prompt = prompt
        self._choices = [rules.transcript(prompt, decode) for _ in range(n)]
        self._call_prefix = "" if rules.form.tools == "mistral" else "call_"
        self._call_ids: dict[tuple[int, int], str] = {}
        self._cached = 0
        self._prompt_logprobs: tuple[Logprobs | None, ...] | None = None

    def begin(self) -> list[str]:
        """The role of every choice."""
        role = {"role": "assistant", "content": ""}
        return [self._chunk(index, role) for index in range(len(self._choices))]

    def add(self, said: GenerateEvent) -> list[str]:
        """Chunks of what became certain; the last of a choice has its finish reason."""
        index = said.sequence_index
        choice = self._choices[index]
        pieces = choice.add(said)
        self._cached = said.cached_tokens
        if said.prompt_logprobs is not None:
            self._prompt_logprobs = said.prompt_logprobs
        deltas = [self._delta(index, piece) for piece in pieces]
        logprobs = None
        if self._header.num_logprobs is not None and said.token_ids:
            positions = zip(said.token_ids, said.logprobs, strict=False)
            logprobs = {"content": chat_logprobs(positions, self._header.num_logprobs)}
            deltas = deltas or [{}]
        chunks = [
            self._chunk(index, delta, None if place else logprobs)
            for place, delta in enumerate(deltas)
        ]
        if said.finish_reason is not None:
            chunks.append(self._chunk(index, {}, finish=_finish_reason(choice)))
        return chunks

    def end(self) -> list[str]:
        """The usage, if it was asked for."""
        if not self._header.include_usage:
            return [DONE]
        return [
            event({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()}),
            DONE,
        ]

    def fail(self, error: RequestError) -> list[str]:
        """An error inside the stream."""
        return [event(openai_error(error)), DONE]

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        body = self._head("chat.completion")
        body["choices"] = [self._choice(i, choice) for i, choice in enumerate(self._choices)]
        body["usage"] = self._usage()
        if self._prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_entries(self._prompt_logprobs)
        return body

    def _choice(self, index: int, choice: Transcript) -> dict[str, Any]:
        calls = choice.calls
        text = choice.text("content")
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text if text or not calls else None,
            "refusal": None,
        }
        reasoning = choice.text("reasoning")
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [
                {
                    "id": self._call_id(index, place),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.text},
                }
                for place, call in enumerate(calls)
            ]
        logprobs = None
        if self._header.num_logprobs is not None:
            logprobs = {"content": chat_logprobs(choice.logprobs, self._header.num_logprobs)}
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": _finish_reason(choice),
        }

    def _delta(self, index: int, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, Content):
            return {"content": piece.text}
        if isinstance(piece, CallBegin):
            call = {
                "index": piece.index,
                "id": self._call_id(index, piece.index),
                "type": "function",
                "function": {"name": piece.name, "arguments": ""},
            }
            return {"tool_calls": [call]}
        if isinstance(piece, CallArguments):
            return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
        return {"reasoning_content": piece.text}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self._header.usage_always:
            chunk["usage"] = self._usage()
        elif self._header.include_usage:
            chunk["usage"] = None
        return event(chunk)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._header.model,
            "system_fingerprint": self._header.fingerprint,
        }

    def _call_id(self, index: int, place: int) -> str:
        return self._call_ids.setdefault((index, place), call_id(self._call_prefix))

    def _usage(self) -> dict[str, Any]:
        return answer_usage([self._prompt], {0: self._cached}, self._choices).openai()


def answer_usage(
    prompts: Sequence[Sequence[int]], cached: dict[int, int], choices: Sequence[Transcript]
) -> Usage:
    """The usage of a request so far."""
    usage = prompt_usage(prompts, cached)
    usage.completion_tokens = sum(choice.num_tokens for choice in choices)
    usage.reasoning_tokens = sum(choice.num_reasoning_tokens for choice in choices)
    return usage


def _finish_reason(choice: Transcript) -> str:
    """OpenAI's words: stop, length, tool_calls."""
    if choice.finish_reason == "length":
        return "length"
    return "tool_calls" if choice.calls else "stop"
