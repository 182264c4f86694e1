"""Texts to token ids beside the event loop, which goes on serving meanwhile."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from flashformer.engine.tokenizer import Tokenizer
from flashformer.serve.server.child import return_memory

NUM_THREADS = 2  # a megabyte of text takes a hundred of memory while it is encoded
_LONG_TEXT = 1 << 14  # characters
_HUGE_TEXT = 1 << 18  # characters; the memory that it took is given back


class Encoders:
    """A few threads; short texts do without."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_THREADS, "encode")

    async def encode(
        self, tokenizer: Tokenizer, text: str, *, add_special_tokens: bool
    ) -> list[int]:
        """The token ids of a text."""
        if len(text) < _LONG_TEXT:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        work = partial(_encode_long, tokenizer, text, add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Drop what has not begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _encode_long(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    token_ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    if len(text) > _HUGE_TEXT:
        return_memory()
    return token_ids
