"""`/v1/messages`: what a client hears.

events -> Anthropic's named events, or one body
"""

import json
from collections.abc import Sequence
from typing import Any

from flashformer.serve.protocol.asked import event, new_id
from flashformer.serve.protocol.chat_answer import answer_usage
from flashformer.serve.protocol.pieces import CallArguments, CallBegin, Content, Piece
from flashformer.serve.protocol.rules import AnswerRules
from flashformer.serve.protocol.transcript import Block
from flashformer.serve.server.endpoint import Decode, RequestError
from flashformer.serve.server.messages import GenerateEvent

_ERRORS = {
    400: "invalid_request_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class MessageAnswer:
    """A `Responder`: one content block for each block of the answer."""

    def __init__(
        self, model: str, rules: AnswerRules, prompt: Sequence[int], decode: Decode
    ) -> None:
        self._model = model
        self._id = new_id("msg_")
        self._prompt = prompt
        self._answer = rules.transcript(prompt, decode)
        self._call_prefix = "" if rules.form.tools == "mistral" else "toolu_"
        self._cached = 0
        self._kind = ""  # of the block that is growing
        self._num_blocks = 0
        self._started = False

    def begin(self) -> list[str]:
        """Nothing: the start tells the cached tokens, which come with the first event."""
        return []

    def add(self, said: GenerateEvent) -> list[str]:
        """Blocks that begin, grow and end."""
        self._cached = said.cached_tokens
        says = [] if self._started else [self._start()]
        self._started = True
        for piece in self._answer.add(said):
            says += self._take(piece)
        if said.finish_reason is not None:
            says += self._close()
        return says

    def end(self) -> list[str]:
        """Why the message ended, and what it took."""
        reason, sequence = self._stop()
        delta = {
            "type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": sequence},
            "usage": self._usage(),
        }
        return [_say(delta), _say({"type": "message_stop"})]

    def fail(self, error: RequestError) -> list[str]:
        """An error inside the stream."""
        kind = _ERRORS.get(error.status, "api_error")
        return [_say({"type": "error", "error": {"type": kind, "message": error.message}})]

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        blocks = self._answer.blocks
        reason, sequence = self._stop()
        message = self._message()
        message["content"] = [self._block(block) for block in blocks] or [
            {"type": "text", "text": ""}
        ]
        return message | {"stop_reason": reason, "stop_sequence": sequence}

    def _start(self) -> str:
        return _say({"type": "message_start", "message": self._message()})

    def _message(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _take(self, piece: Piece) -> list[str]:
        if isinstance(piece, CallBegin):
            block: dict[str, Any] = {
                "type": "tool_use",
                "id": self._call_id(),
                "name": piece.name,
                "input": {},
            }
            return [*self._close(), self._open("call", block)]
        if isinstance(piece, CallArguments):
            return [self._delta({"type": "input_json_delta", "partial_json": piece.text})]
        kind = "content" if isinstance(piece, Content) else "reasoning"
        says: list[str] = []
        if kind != self._kind:
            block = {"type": "text", "text": ""}
            if kind == "reasoning":
                block = {"type": "thinking", "thinking": "", "signature": ""}
            says = [*self._close(), self._open(kind, block)]
        if kind == "content":
            return [*says, self._delta({"type": "text_delta", "text": piece.text})]
        return [*says, self._delta({"type": "thinking_delta", "thinking": piece.text})]

    def _open(self, kind: str, block: dict[str, Any]) -> str:
        self._kind = kind
        self._num_blocks += 1
        return _say(
            {
                "type": "content_block_start",
                "index": self._num_blocks - 1,
                "content_block": block,
            }
        )

    def _close(self) -> list[str]:
        if not self._kind:
            return []
        self._kind = ""
        return [_say({"type": "content_block_stop", "index": self._num_blocks - 1})]

    def _delta(self, delta: dict[str, Any]) -> str:
        return _say({"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta})

    def _block(self, block: Block) -> dict[str, Any]:
        if block.kind == "content":
            return {"type": "text", "text": block.text}
        if block.kind == "reasoning":
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        try:
            arguments = json.loads(block.text)
        except ValueError:  # cut off by the limit of tokens
            arguments = {}
        return {
            "type": "tool_use",
            "id": self._call_id(),
            "name": block.name,
            "input": arguments if isinstance(arguments, dict) else {},
        }

    def _call_id(self) -> str:
        return new_id("toolu_")[:30] if self._call_prefix else new_id("")[:9]

    def _stop(self) -> tuple[str, str | None]:
        answer = self._answer
        if answer.finish_reason == "length":
            return "max_tokens", None
        if answer.calls:
            return "tool_use", None
        if isinstance(answer.stop_reason, str):
            return "stop_sequence", answer.stop_reason
        return "end_turn", None

    def _usage(self) -> dict[str, Any]:
        return answer_usage([self._prompt], {0: self._cached}, [self._answer]).anthropic()


def _say(value: dict[str, Any]) -> str:
    return event(value, value["type"])
