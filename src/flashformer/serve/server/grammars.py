"""Compiles grammars beside the engine's pump, which goes on stepping meanwhile.

`wire.Submit` with a grammar -> a constraint for each of its sequences, or why there is none.
"""

import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from flashformer.engine.constraint import Constraint
from flashformer.errors import FlashFormerError, UsageError
from flashformer.serve.server import wire

if TYPE_CHECKING:
    from flashformer.engine.llm import LLM
    from flashformer.serve.protocol.grammar import GrammarCompiler

Compiled = tuple[wire.Submit, Sequence[Constraint] | UsageError]


class GrammarQueue:
    """One thread that compiles; a descriptor that becomes readable when something is done."""

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK)
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._done: deque[Compiled] = deque()
        self._wanted: set[int] = set()
        self._lock = threading.Lock()
        self._llm: LLM | None = None
        self._compiler: GrammarCompiler | None = None

    def use(self, llm: "LLM") -> None:
        """Compile for this model."""
        self._llm = llm

    def start(self, submit: wire.Submit) -> None:
        """Begin; the result comes out of `finished`."""
        with self._lock:
            self._wanted.add(submit.key)
        self._thread.submit(self._compile, submit)

    def forget(self, key: int) -> None:
        """The request was cancelled."""
        with self._lock:
            self._wanted.discard(key)

    def finished(self) -> list[Compiled]:
        """What is done and still wanted, in the order of its arrival."""
        if not self._done:
            return []
        os.eventfd_read(self.descriptor)
        with self._lock:
            ready = [entry for entry in self._done if entry[0].key in self._wanted]
            self._wanted.difference_update(entry[0].key for entry in ready)
            self._done.clear()
        return ready

    def _compile(self, submit: wire.Submit) -> None:
        with self._lock:
            if submit.key not in self._wanted:
                return
        result: Sequence[Constraint] | UsageError
        try:
            assert submit.grammar is not None
            compiled = self._ready_compiler().compile(submit.grammar)
            count = len(submit.prompts) * submit.params["n"]
            result = [compiled.constraint() for _ in range(count)]
        except UsageError as error:
            result = error
        except Exception as error:
            result = UsageError(f"the grammar cannot be used: {type(error).__name__}: {error}")
        with self._lock:
            self._done.append((submit, result))
        os.eventfd_write(self.descriptor, 1)

    def _ready_compiler(self) -> "GrammarCompiler":
        """Made with the first grammar: that takes a second for a large vocabulary."""
        from flashformer.serve.protocol.grammar import GrammarCompiler

        if self._compiler is None:
            if self._llm is None or self._llm.tokenizer is None:
                raise FlashFormerError("the checkpoint has no tokenizer")
            engine = self._llm.engine
            self._compiler = GrammarCompiler(
                self._llm.tokenizer, self._llm.spec.vocab_size, engine.eos_token_ids
            )
        return self._compiler
