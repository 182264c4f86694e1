"""Logprobs in the shapes of the APIs.

entries of one position -> JSON; the first entry is the chosen token's.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from flashformer.engine.logprobs import Logprob
from flashformer.engine.sequence import Logprobs

LEAST = -9999.0  # stands for minus infinity, which JSON cannot write


def chat_entry(token_id: int, entries: Logprobs, num_best: int) -> dict[str, Any]:
    """One token in `logprobs.content` of chat completions and responses."""
    return {
        **_token(entries[token_id]),
        "top_logprobs": [_token(p) for p in best(entries, num_best)],
    }


def chat_logprobs(positions: Iterable[tuple[int, Logprobs]], num_best: int) -> list[dict[str, Any]]:
    """`logprobs.content` of some tokens."""
    return [chat_entry(token_id, entries, num_best) for token_id, entries in positions]


def completion_logprobs(
    positions: Sequence[tuple[int, Logprobs | None]],
    num_best: int,
    offset: int,
    texts: Sequence[str],
) -> dict[str, Any]:
    """`logprobs` of completions; `offset` is that of the first token's text in the whole text.

    `texts` are the tokens' own; a position without entries is the first of a prompt.
    """
    chosen, top, offsets = [], [], []
    for (token_id, entries), text in zip(positions, texts, strict=True):
        offsets.append(offset)
        offset += len(text)
        chosen.append(None if entries is None else number(entries[token_id]))
        top.append(None if entries is None else _named(best(entries, num_best)))
    return {
        "tokens": list(texts),
        "token_logprobs": chosen,
        "top_logprobs": top,
        "text_offset": offsets,
    }


def prompt_entries(positions: Sequence[Logprobs | None]) -> list[dict[str, Any] | None]:
    """`prompt_logprobs`: by token id, as local servers write them."""
    return [
        None
        if entries is None
        else {
            str(token_id): {"logprob": number(p), "rank": p.rank, "decoded_token": p.decoded_token}
            for token_id, p in entries.items()
        }
        for entries in positions
    ]


def best(entries: Logprobs, num_best: int) -> list[Logprob]:
    """The likeliest entries in their order."""
    return sorted((p for p in entries.values() if p.rank <= num_best), key=lambda p: p.rank)


def number(entry: Logprob) -> float:
    """A logprob as JSON can hold it."""
    return max(entry.logprob, LEAST)


def token_text(entry: Logprob) -> str:
    """The token as text; a part of a character is shown as U+FFFD."""
    return entry.decoded_token or ""


def _named(entries: Iterable[Logprob]) -> dict[str, float]:
    named: dict[str, float] = {}
    for entry in entries:  # of two tokens that look alike the likelier one counts
        named.setdefault(token_text(entry), number(entry))
    return named


def _token(entry: Logprob) -> dict[str, Any]:
    text = token_text(entry)
    # A part of a character has no text of its own, and its bytes are not known here.
    known = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": number(entry), "bytes": known}
