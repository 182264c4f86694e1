"""What an answer is made of, in the order in which it comes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call whose name is known."""

    index: int  # of the call in its answer
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next characters of a call's arguments, JSON as the model writes it."""

    index: int
    text: str


Piece = Reasoning | Content | CallBegin | CallArguments
