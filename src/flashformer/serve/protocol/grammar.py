"""Grammars by llguidance: which tokens may follow in a text that must have a form.

`Grammar` of a request -> `GrammarCompiler.compile` -> `CompiledGrammar` -> a constraint a sequence.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from flashformer.engine.tokenizer import Tokenizer
from flashformer.errors import ParameterError
from flashformer.serve.server.messages import Grammar

MAX_SOURCE_BYTES = 256 << 10
MAX_SECONDS = 2.0
CACHE_BYTES = 128 << 20
# What a compiled grammar holds, measured with schemas of 0.3 to 100 KB: 0.2 MB, and 55 to 65 times
# the length of a long source.
_BYTES_EACH = 256 << 10
_BYTES_PER_SOURCE_BYTE = 64
# The compiler recurses along references and rules, by at most 10 KB of stack a level; the shortest
# level is 10 bytes of source.
_STACK_BYTES = 512 << 20
_start_lock = threading.Lock()  # threading.stack_size() is a setting of the process


class GrammarConstraint:
    """The state of one sequence's grammar; an `engine.constraint.Constraint`."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, never: list[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._never = never

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may follow, [vocab_size]; end tokens where the text may end.

        Raises `ValueError` where the grammar exceeds a limit of the parser.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require_sound()
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        mask[self._never] = False
        return mask

    def accept(self, token_id: int) -> None:
        """Take the chosen token; `ValueError` if the grammar does not allow it."""
        self._matcher.consume_token(token_id)
        self._require_sound()

    @property
    def complete(self) -> bool:
        """Whether nothing may follow any more."""
        return self._matcher.is_stopped()

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot be followed: {_first_line(self._matcher)}")


class CompiledGrammar:
    """A grammar at its start, from which the sequences of a request begin."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, never: list[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._never = never

    def constraint(self) -> GrammarConstraint:
        """A new sequence's constraint."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab_size, self._never)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps the last ones. Safe to use from threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        *,
        cache_bytes: int = CACHE_BYTES,
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        """`vocab_size` is the model's, which may exceed the tokenizer's."""
        ends = sorted(i for i in set(eos_token_ids) if i < tokenizer.vocab_size)
        self._tokenizer = LLTokenizer(
            tokenizer.to_json(), n_vocab=vocab_size, eos_token=ends or None
        )
        # llguidance takes some token for the end where the model names none.
        self._never = sorted(set(self._tokenizer.eos_tokens) - set(ends))
        self._vocab_size = vocab_size
        self._limits = LLParserLimits(max_lexer_states=16384, verbose_errors=False)
        self._cache: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._held_bytes = 0
        self._max_seconds = max_seconds
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """An estimate of what the cached grammars hold."""
        return self._held_bytes

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """`grammar`, from the cache or within `max_seconds`; else `ParameterError` says why not."""
        with self._lock:
            if grammar in self._cache:
                self._cache.move_to_end(grammar)
                return self._cache[grammar]
        compiled = CompiledGrammar(self._matcher(grammar), self._vocab_size, self._never)
        with self._lock:
            self._keep(grammar, compiled)
        return compiled

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        if len(grammar.source.encode("utf-8", "replace")) > MAX_SOURCE_BYTES:
            raise ParameterError(grammar.field, f"may hold at most {MAX_SOURCE_BYTES} bytes")
        made: list[LLMatcher] = []

        def work() -> None:
            made.append(
                LLMatcher(self._tokenizer, _program(grammar), log_level=0, limits=self._limits)
            )

        thread = _start(work)
        thread.join(self._max_seconds)  # one that takes longer ends at the compiler's own limits
        if not made:
            raise ParameterError(
                grammar.field,
                f"could not be compiled within {self._max_seconds:g} seconds; make it simpler",
            )
        if made[0].is_error():
            raise ParameterError(grammar.field, f"is not usable: {_first_line(made[0])}")
        return made[0]

    def _keep(self, grammar: Grammar, compiled: CompiledGrammar) -> None:
        if grammar not in self._cache:
            self._cache[grammar] = compiled
            self._held_bytes += _cost(grammar)
        while self._held_bytes > self._cache_bytes:
            oldest, _ = self._cache.popitem(last=False)
            self._held_bytes -= _cost(oldest)


def _cost(grammar: Grammar) -> int:
    return _BYTES_EACH + _BYTES_PER_SOURCE_BYTE * len(grammar.source)


def _program(grammar: Grammar) -> str:
    """The grammar as llguidance reads it."""
    if grammar.kind == "json_object":
        return LLMatcher.grammar_from_json_schema('{"type": "object"}')
    if grammar.kind == "json_schema":
        return json.dumps({"grammars": [{"json_schema": json.loads(grammar.source)}]})
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.source)
    return LLMatcher.grammar_from_lark(grammar.source)


def _start(work: object) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True, name="grammar")  # type: ignore[arg-type]
    with _start_lock:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return thread


def _first_line(matcher: LLMatcher) -> str:
    """What llguidance says, short enough for a sentence."""
    lines = [line.strip() for line in matcher.get_error().splitlines() if line.strip()]
    text = " ".join(lines)[:300].rstrip()
    return text or "it cannot be matched"
