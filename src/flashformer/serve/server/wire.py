"""Frames between the server's processes: typed messages over a socket that only they hold.

dataclass -> 4 bytes of length, MessagePack -> the same dataclass. Nothing in a frame can run.
"""

import asyncio
import select
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from flashformer.serve.server.messages import GenerateEvent, Grammar, ModelInfo

MAX_FRAME_BYTES = 1 << 28
_READ_BYTES = 1 << 18


class Submit(msgspec.Struct, tag="submit", array_like=True):
    """To the engine: queue these prompts. `resume` holds what every sequence chose already."""

    key: int
    prompts: tuple[tuple[int, ...], ...]
    params: dict[str, Any]  # fields of SamplingParams, the seed among them
    grammar: Grammar | None = None
    resume: tuple[tuple[tuple[int, ...], ...], ...] = ()  # [prompts][n][tokens]


class Cancel(msgspec.Struct, tag="cancel", array_like=True):
    """To the engine: end this request now; nothing of it is told any more."""

    key: int


class Ping(msgspec.Struct, tag="ping", array_like=True):
    """To the engine: show that you can still compute."""


class Loading(msgspec.Struct, tag="loading", array_like=True):
    """From the engine: progress of the load."""

    what: str
    done: int
    total: int


class Ready(msgspec.Struct, tag="ready", array_like=True):
    """From the engine: the model is loaded."""

    info: ModelInfo
    folder: str  # of the checkpoint
    memory: str  # one sentence
    read_gb_s: float | None  # read bandwidth measured on the model's own image


class Failed(msgspec.Struct, tag="failed", array_like=True):
    """From the engine: the model cannot be loaded."""

    kind: str
    message: str
    exit_code: int


class Rejected(msgspec.Struct, tag="rejected", array_like=True):
    """From the engine: this request can never run."""

    key: int
    message: str
    parameter: str | None
    too_long: bool  # for the context


class Usage(msgspec.Struct, tag="usage", array_like=True):
    """From the engine: what is taken; with a step now and then, alone when work ends early."""

    slots: tuple[tuple[int, int, int], ...]  # (key, stored positions, of the prompt)
    num_waiting: int  # sequences without a slot
    pages_used: int
    pages_cached: int  # kept for their content, free to be taken
    kv_step_bytes: int = 0  # keys and values that a step must read
    # Of the last step, in the order of `ModelInfo.stages`; () where the backend keeps no times or
    # the step read prompts.
    stage_seconds: tuple[float, ...] = ()


class Step(msgspec.Struct, tag="step", array_like=True):
    """From the engine: what one step did."""

    seconds: float
    num_rows: int
    nbytes: int  # that the step had to read
    started: tuple[int, ...]  # keys of requests whose first sequence got its slot
    events: tuple[tuple[int, GenerateEvent], ...]  # with the keys of their requests
    usage: Usage | None


class Pong(msgspec.Struct, tag="pong", array_like=True):
    """From the engine: it computed a token whose value is known."""

    correct: bool


class Setup(msgspec.Struct, tag="setup", array_like=True):
    """To a helper: what it needs of the checkpoint."""

    templates: dict[str, str]
    special_tokens: dict[str, str]  # that the templates may write
    folder: str  # where tokenizer.json is
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Render(msgspec.Struct, tag="render", array_like=True):
    """To a helper: put a conversation into the chat template."""

    messages: list[Any]
    tools: list[Any] | None
    add_generation_prompt: bool
    continue_final_message: bool
    template_kwargs: dict[str, Any] | None


class CheckGrammar(msgspec.Struct, tag="check", array_like=True):
    """To a helper: see whether a grammar can be compiled."""

    grammar: Grammar


class Done(msgspec.Struct, tag="done", array_like=True):
    """From a helper: the text, or what is wrong with the request."""

    text: str = ""
    error: str | None = None
    parameter: str | None = None


Message = (
    Submit
    | Cancel
    | Ping
    | Loading
    | Ready
    | Failed
    | Rejected
    | Step
    | Usage
    | Pong
    | Setup
    | Render
    | CheckGrammar
    | Done
)
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """A frame, ready to be sent."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "little") + body


@dataclass(slots=True)
class Frames:
    """Cuts a stream of bytes into messages."""

    _rest: bytearray

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that are complete with these bytes."""
        self._rest += data
        messages = []
        place = 0
        while len(self._rest) - place >= 4:
            end = place + 4 + int.from_bytes(self._rest[place : place + 4], "little")
            if end - place > MAX_FRAME_BYTES:
                raise ValueError("a frame is longer than any message can be")
            if end > len(self._rest):
                break
            messages.append(_decoder.decode(self._rest[place + 4 : end]))
            place = end
        del self._rest[:place]
        return messages


class Channel:
    """The blocking end, in a child process. `EOFError` when the parent is gone."""

    def __init__(self, sock: socket.socket, wakers: Sequence[int] = ()) -> None:
        self._sock = sock
        self._wakers = list(wakers)  # descriptors that end a wait as well
        self._frames = Frames()

    def send(self, message: Message) -> None:
        """Hand a message to the parent, which always reads."""
        try:
            self._sock.sendall(encode(message))
        except OSError:
            raise EOFError from None

    def has_news(self) -> bool:
        """Whether `receive` would end without waiting."""
        return bool(select.select([self._sock.fileno(), *self._wakers], [], [], 0)[0])

    def receive(self, timeout: float) -> list[Message]:
        """The messages that came, after waiting at most `timeout` seconds for the first."""
        descriptor = self._sock.fileno()
        ready, _, _ = select.select([descriptor, *self._wakers], [], [], timeout)
        if descriptor not in ready:
            return []
        try:
            data = self._sock.recv(_READ_BYTES)
        except OSError:
            data = b""
        if not data:
            raise EOFError
        return self._frames.feed(data)


class Link(asyncio.Protocol):
    """The event loop's end: calls `on_message` for each message and `on_lost` once."""

    def __init__(self, on_message: Callable[[Message], None], on_lost: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Pass on what is complete."""
        for message in self._frames.feed(data):
            self._on_message(message)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell the owner that the child is gone."""
        self._transport = None
        self._on_lost()

    def send(self, message: Message) -> None:
        """Queue a message; nothing happens once the child is gone."""
        if self._transport is not None:
            self._transport.write(encode(message))

    def close(self) -> None:
        """Hang up: the child ends itself when it notices."""
        if self._transport is not None:
            self._transport.abort()
