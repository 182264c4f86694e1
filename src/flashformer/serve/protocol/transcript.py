"""One sequence's answer as it grows: reasoning, text and tool calls, and what they cost.

`GenerateEvent`s -> pieces as they become certain, and the blocks that they add up to.
"""

from dataclasses import dataclass, field

from flashformer.engine.sequence import Logprobs
from flashformer.serve.protocol.incremental import content
from flashformer.serve.protocol.pieces import (
    CallArguments,
    CallBegin,
    Content,
    Piece,
    Reasoning,
)
from flashformer.serve.protocol.reasoning import ReasoningParser
from flashformer.serve.protocol.tool_parsers import ToolParser
from flashformer.serve.server.messages import GenerateEvent


@dataclass(slots=True)
class Block:
    """A run of pieces of one kind: one text, one stretch of reasoning, or one call."""

    kind: str  # reasoning | content | call
    text: str = ""  # a call's arguments
    name: str = ""  # of a call


@dataclass(slots=True)
class Transcript:
    """The state of one answer."""

    reasoning: ReasoningParser | None = None
    tools: ToolParser | None = None
    parallel_calls: bool = True  # otherwise calls behind the first are dropped
    blocks: list[Block] = field(default_factory=list)
    logprobs: list[tuple[int, Logprobs]] = field(default_factory=list)  # (token id, entries)
    num_tokens: int = 0
    num_reasoning_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_undecided: int = 0  # tokens at the start that may yet turn out to open the reasoning

    def add(self, event: GenerateEvent) -> list[Piece]:
        """Take an event; what became certain with it."""
        parser = self.reasoning
        before = parser is not None and parser.inside
        pieces = self._pieces(event)
        self.num_tokens += len(event.token_ids)
        self.num_undecided += len(event.token_ids)
        if parser is not None and (before or parser.inside):
            self.num_reasoning_tokens += self.num_undecided
        if parser is None or not parser.undecided:
            self.num_undecided = 0
        self.logprobs += zip(event.token_ids, event.logprobs, strict=False)
        self.finish_reason = event.finish_reason
        self.stop_reason = event.stop_reason
        for piece in pieces:
            self._note(piece)
        return pieces

    @property
    def calls(self) -> list[Block]:
        """The tool calls in their order."""
        return [block for block in self.blocks if block.kind == "call"]

    def text(self, kind: str) -> str:
        """All blocks of a kind together."""
        return "".join(block.text for block in self.blocks if block.kind == kind)

    def _pieces(self, event: GenerateEvent) -> list[Piece]:
        ended = event.finish_reason is not None
        if self.reasoning is None:
            pieces = content(event.text)
        else:
            pieces = self.reasoning.add(event.text)
            if ended:
                pieces += self.reasoning.finish()
        if self.tools is None:
            return pieces
        parsed: list[Piece] = []
        for piece in pieces:
            parsed += self.tools.add(piece.text) if isinstance(piece, Content) else [piece]
        if ended:
            parsed += self.tools.finish()
        return [piece for piece in parsed if self.parallel_calls or not _is_later_call(piece)]

    def _note(self, piece: Piece) -> None:
        if isinstance(piece, CallBegin):
            self.blocks.append(Block("call", name=piece.name))
            return
        if isinstance(piece, CallArguments):
            kind = "call"
        else:
            kind = "reasoning" if isinstance(piece, Reasoning) else "content"
        if not self.blocks or self.blocks[-1].kind != kind:
            self.blocks.append(Block(kind))
        self.blocks[-1].text += piece.text


def _is_later_call(piece: Piece) -> bool:
    return isinstance(piece, CallBegin | CallArguments) and piece.index > 0
