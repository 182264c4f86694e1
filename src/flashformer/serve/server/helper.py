"""A helper process: runs what a checkpoint or a client wrote, where it can be killed.

`python -m flashformer.serve.server.helper FD BYTES`: `Render` and `CheckGrammar` -> `Done`. A chat
template is a program and a grammar may explode; neither can be interrupted inside Python.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashformer.engine.chat import ChatTemplates
from flashformer.errors import FlashFormerError, ParameterError
from flashformer.serve.server import wire
from flashformer.serve.server.child import limit_memory, open_channel

if TYPE_CHECKING:
    from flashformer.serve.protocol.grammar import GrammarCompiler

_IDLE_SECONDS = 3600.0


class Helper:
    """Answers one message at a time."""

    def __init__(self) -> None:
        self._setup: wire.Setup | None = None
        self._templates = ChatTemplates({}, {})
        self._compiler: GrammarCompiler | None = None

    def answer(self, message: wire.Message) -> wire.Done:
        """Do what is asked; whatever goes wrong is the request's fault."""
        try:
            return wire.Done(self._do(message))
        except ParameterError as error:
            return wire.Done(error=str(error), parameter=error.parameter)
        except FlashFormerError as error:
            return wire.Done(error=str(error))
        except MemoryError:
            return wire.Done(error="needs more memory than it may use.")
        except Exception as error:
            return wire.Done(error=f"failed: {type(error).__name__}: {str(error)[:300]}")

    def _do(self, message: wire.Message) -> str:
        if isinstance(message, wire.Setup):
            self._setup = message
            self._templates = ChatTemplates(message.templates, message.special_tokens)
        elif isinstance(message, wire.Render):
            return self._templates.render(
                message.messages,
                tools=message.tools,
                add_generation_prompt=message.add_generation_prompt,
                continue_final_message=message.continue_final_message,
                template_kwargs=message.template_kwargs,
            )
        elif isinstance(message, wire.CheckGrammar):
            self._ready_compiler().compile(message.grammar)
        return ""

    def _ready_compiler(self) -> "GrammarCompiler":
        from flashformer.engine.tokenizer import Tokenizer
        from flashformer.serve.protocol.grammar import GrammarCompiler

        if self._compiler is None:
            assert self._setup is not None
            tokenizer = Tokenizer.from_folder(Path(self._setup.folder))
            if tokenizer is None:
                raise FlashFormerError("the checkpoint has no tokenizer.json.")
            self._compiler = GrammarCompiler(
                tokenizer, self._setup.vocab_size, self._setup.eos_token_ids
            )
        return self._compiler


def main(argv: Sequence[str]) -> int:
    """Answer until the server hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = open_channel(int(argv[0]))
    limit_memory(int(argv[1]))
    helper = Helper()
    try:
        while True:
            for message in channel.receive(_IDLE_SECONDS):
                channel.send(helper.answer(message))
    except EOFError:
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
