"""`flashformer chat`: a conversation, line by line.

stdin lines -> answers on stdout
"""

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

from flashformer.engine.llm import LLM
from flashformer.errors import UsageError
from flashformer.serve import options
from flashformer.serve.answer import Answer, Interrupt, collect, sampling_params, write_text
from flashformer.serve.load import LoadOptions, load_llm
from flashformer.serve.speed import measure_speed
from flashformer.serve.terminal import Terminal, no_text, write_json

HELP = """\
/reset  forget the conversation
/exit   leave (or Ctrl-D)
/help   this list
Ctrl-C stops an answer."""


@dataclass(slots=True)
class Conversation:
    """The messages so far; the system message survives a reset."""

    system: str | None
    messages: list[dict[str, str]] = field(default_factory=list)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages.clear()

    def ask(self, text: str) -> list[dict[str, str]]:
        """Add the user's message; the whole conversation for the model."""
        self.messages.append({"role": "user", "content": text})
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.messages

    def take_back(self) -> None:
        """Forget the last message, which could not be answered."""
        self.messages.pop()

    def answered(self, text: str) -> None:
        """Add the model's answer, even one that was stopped."""
        self.messages.append({"role": "assistant", "content": text})


def chat(
    model: options.Model = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    temp: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    device: options.Device = "auto",
    quant: options.Quant = None,
    context: options.Context = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Talk with a model. Commands: /help, /reset, /exit; Ctrl-C stops an answer.

    Lines may also come through a pipe, one message a line. With --json each answer is one JSON
    document.
    """
    given = {
        "max_tokens": max_tokens,
        "temperature": temp,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
    }
    sampling_params(None, given)  # a wrong flag is told before the model is loaded
    with Terminal(quiet=quiet) as terminal:
        loaded = LoadOptions(model, device, quant, context, threads)
        started = time.perf_counter()
        with closing(load_llm(loaded, terminal)) as llm:
            load_s = time.perf_counter() - started
            params = sampling_params(llm.default_sampling_params, given)
            conversation = Conversation(system)
            for line in _lines(terminal):
                if line.startswith("/"):
                    if _command(line, conversation, terminal):
                        return
                    continue
                try:
                    chunks = llm.chat_stream(conversation.ask(line), params)
                except UsageError as error:  # the conversation has outgrown the context, say
                    if not sys.stdin.isatty():
                        raise
                    conversation.take_back()
                    terminal.note(f"error: {error} (/reset forgets the conversation)")
                    continue
                with closing(chunks), Interrupt() as interrupt:
                    answer = collect(chunks, None if as_json else write_text, interrupt)
                conversation.answered(answer.text)
                _finish(answer, llm, load_s, as_json, terminal)


def _finish(answer: Answer, llm: LLM, load_s: float, as_json: bool, terminal: Terminal) -> None:
    """Report an answer: as JSON, or its speed to a person who watches."""
    watched = as_json or (sys.stderr.isatty() and not terminal.quiet)
    speed = measure_speed(answer, llm, load_s) if watched else None
    if as_json:
        write_json(answer.to_json(speed.to_json() if speed else None))
        return
    write_text("\n")
    if speed is not None:
        terminal.note(speed.line())


def _lines(terminal: Terminal) -> Iterator[str]:
    """The user's lines without empty ones; a Ctrl-C at the prompt only drops the line."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (gives input() its editing keys and history)

        terminal.note("/help lists the commands")
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except KeyboardInterrupt:
            terminal.note("")
            continue
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise no_text(error) from None
        if not interactive and not line:
            return
        if line.strip():
            yield line.strip()


def _command(line: str, conversation: Conversation, terminal: Terminal) -> bool:
    """Obey a line that starts with a slash; whether it ends the chat."""
    if line in ("/exit", "/quit"):
        return True
    if line == "/reset":
        conversation.reset()
        terminal.note("the conversation is forgotten")
    elif line == "/help":
        for text in HELP.splitlines():
            terminal.note(text)
    else:
        terminal.note(f"{line.split()[0]} is no command; /help lists them")
    return False
