"""`/v1/responses`: what a client hears.

events -> OpenAI's named events with their sequence numbers, or one body
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashformer.engine.sampling import SamplingParams
from flashformer.serve.protocol.asked import call_id, event, new_id
from flashformer.serve.protocol.chat_answer import answer_usage
from flashformer.serve.protocol.logprobs import chat_logprobs
from flashformer.serve.protocol.pieces import CallArguments, CallBegin, Content, Piece
from flashformer.serve.protocol.rules import AnswerRules
from flashformer.serve.server.endpoint import Decode, RequestError
from flashformer.serve.server.messages import GenerateEvent

_KINDS = {"reasoning": "reasoning_text", "content": "output_text"}


@dataclass(frozen=True, slots=True)
class ResponseHeader:
    """What a response repeats of its request."""

    model: str
    params: SamplingParams
    request: Mapping[str, Any]  # the body, for the fields that are only repeated
    num_logprobs: int | None


class ResponseAnswer:
    """A `Responder`: one output item for each block of the answer."""

    def __init__(
        self, header: ResponseHeader, rules: AnswerRules, prompt: Sequence[int], decode: Decode
    ) -> None:
        self._header = header
        self._id = new_id("resp_")
        self._created = int(time.time())
        self._prompt = prompt
        self._answer = rules.transcript(prompt, decode)
        self._call_prefix = "" if rules.form.tools == "mistral" else "call_"
        self._items: list[dict[str, Any]] = []
        self._open = False  # whether the last item is still growing
        self._cached = 0
        self._sequence_number = 0
        self._logprobs: list[dict[str, Any]] = []  # of the item that is growing

    def begin(self) -> list[str]:
        """The response before its first token."""
        state = self._response("in_progress")
        return [
            self._say("response.created", response=state),
            self._say("response.in_progress", response=state),
        ]

    def add(self, said: GenerateEvent) -> list[str]:
        """Items that begin, grow and end."""
        self._cached = said.cached_tokens
        new = self._new_logprobs(said)
        says: list[str] = []
        for piece in self._answer.add(said):
            says += self._take(piece, new)
            if isinstance(piece, Content):
                new = []  # told with the first text that they belong to
        if self._open and self._items[-1]["type"] == "message":
            self._logprobs += new
        if said.finish_reason is not None:
            says += self._close(said.finish_reason == "length")
            says += self._ensure_message()
        return says

    def end(self) -> list[str]:
        """The whole response."""
        status = self._status()
        return [self._say(f"response.{status}", response=self._response(status))]

    def fail(self, error: RequestError) -> list[str]:
        """An error inside the stream."""
        response = self._response("failed")
        kind = "server_error" if error.status >= 500 else "invalid_prompt"
        response["error"] = {"code": kind, "message": error.message}
        return [
            self._say("error", code=error.code, message=error.message, param=error.param),
            self._say("response.failed", response=response),
        ]

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        return self._response(self._status())

    def _status(self) -> str:
        return "incomplete" if self._answer.finish_reason == "length" else "completed"

    def _new_logprobs(self, said: GenerateEvent) -> list[dict[str, Any]]:
        if self._header.num_logprobs is None:
            return []
        positions = zip(said.token_ids, said.logprobs, strict=False)
        entries = chat_logprobs(positions, self._header.num_logprobs)
        for entry in entries:
            for token in (entry, *entry["top_logprobs"]):
                token["bytes"] = token["bytes"] or []  # the client's type has no null here
        return entries

    def _take(self, piece: Piece, logprobs: list[dict[str, Any]]) -> list[str]:
        if isinstance(piece, CallBegin):
            return [*self._close(), self._begin_call(piece)]
        item = self._items[-1] if self._open else None
        if isinstance(piece, CallArguments):
            assert item is not None
            item["arguments"] += piece.text
            return [self._of_item("response.function_call_arguments.delta", delta=piece.text)]
        kind = "content" if isinstance(piece, Content) else "reasoning"
        says: list[str] = []
        if item is None or item["type"] != ("message" if kind == "content" else "reasoning"):
            says = [*self._close(), *self._begin_text(kind)]
            item = self._items[-1]
        item["content"][0]["text"] += piece.text
        more: dict[str, Any] = {"content_index": 0, "delta": piece.text}
        if kind == "content":
            more["logprobs"] = logprobs
            self._logprobs += logprobs
        return [*says, self._of_item(f"response.{_KINDS[kind]}.delta", **more)]

    def _begin_call(self, piece: CallBegin) -> str:
        item = {
            "id": new_id("fc_"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call_id(self._call_prefix),
            "name": piece.name,
            "arguments": "",
        }
        return self._begin(item)

    def _begin_text(self, kind: str) -> list[str]:
        if kind == "content":
            item: dict[str, Any] = {"id": new_id("msg_"), "type": "message", "role": "assistant"}
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": []}
        else:
            item = {"id": new_id("rs_"), "type": "reasoning", "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        item |= {"status": "in_progress", "content": []}
        added = self._begin(item)
        item["content"].append(part)
        part_added = self._of_item("response.content_part.added", content_index=0, part={**part})
        return [added, part_added]

    def _begin(self, item: dict[str, Any]) -> str:
        self._items.append(item)
        self._open = True
        self._logprobs = []
        return self._say("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _close(self, cut: bool = False) -> list[str]:
        """End the growing item; `cut`: the limit of tokens ended it."""
        if not self._open:
            return []
        self._open = False
        item = self._items[-1]
        item["status"] = "incomplete" if cut else "completed"
        if item["type"] == "function_call":
            says = [
                self._of_item(
                    "response.function_call_arguments.done",
                    arguments=item["arguments"],
                    name=item["name"],
                )
            ]
        else:
            says = self._end_text(item)
        done = self._say("response.output_item.done", output_index=len(self._items) - 1, item=item)
        return [*says, done]

    def _end_text(self, item: dict[str, Any]) -> list[str]:
        part = item["content"][0]
        more: dict[str, Any] = {"content_index": 0, "text": part["text"]}
        if part["type"] == "output_text":
            more["logprobs"] = self._logprobs
            if self._header.num_logprobs is not None:
                part["logprobs"] = self._logprobs
        return [
            self._of_item(f"response.{part['type']}.done", **more),
            self._of_item("response.content_part.done", content_index=0, part=part),
        ]

    def _ensure_message(self) -> list[str]:
        """An answer without any text is an empty message."""
        if self._items:
            return []
        return [*self._begin_text("content"), *self._close(self._status() == "incomplete")]

    def _of_item(self, kind: str, **more: object) -> str:
        item = self._items[-1]
        return self._say(kind, item_id=item["id"], output_index=len(self._items) - 1, **more)

    def _say(self, kind: str, **more: object) -> str:
        said = event({"type": kind, "sequence_number": self._sequence_number, **more}, kind)
        self._sequence_number += 1
        return said

    def _response(self, status: str) -> dict[str, Any]:
        params, request = self._header.params, self._header.request
        ended = status in ("completed", "incomplete")
        usage = answer_usage([self._prompt], {0: self._cached}, [self._answer])
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "instructions": request.get("instructions"),
            "max_output_tokens": params.max_tokens,
            "metadata": request.get("metadata") or {},
            "model": self._header.model,
            "output": self._items if ended else [],
            "parallel_tool_calls": request.get("parallel_tool_calls", True) is not False,
            "previous_response_id": None,
            "reasoning": request.get("reasoning") or {"effort": None, "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": request.get("text") or {"format": {"type": "text"}},
            "tool_choice": request.get("tool_choice") or "auto",
            "tools": request.get("tools") or [],
            "top_logprobs": self._header.num_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": usage.responses() if ended else None,
        }
