"""Text to token ids and back, as the checkpoint's tokenizer.json says.

tokenizer.json + tokenizer_config.json -> `Tokenizer`.
"""

import json
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from flashformer.engine.detokenizer import (
    ByteLevelDetokenizer,
    Detokenizer,
    WindowDetokenizer,
    token_bytes,
)
from flashformer.errors import CheckpointError, UsageError
from flashformer.model.checkpoint import member, read_json

FILE = "tokenizer.json"
MAX_FILE_BYTES = 64 << 20
_LONG_TEXT = 1 << 14  # characters
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def read_optional_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint, {} if there is no such file."""
    if not os.path.lexists(folder / name):
        return {}
    return read_json(folder, name, MAX_FILE_BYTES)


def read_text(path: Path, max_bytes: int) -> str:
    """A text file of a checkpoint; `CheckpointError` if it is too large or not UTF-8."""
    try:
        if path.stat().st_size > max_bytes:
            raise CheckpointError(
                f"{path} is larger than {max_bytes} bytes, too large for what it should hold; "
                "download it again."
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as UTF-8 text ({type(error).__name__}); download it again."
        ) from None


class Tokenizer:
    """A checkpoint's tokenizer."""

    def __init__(
        self, content: str, config: dict[str, Any], origin: str = "tokenizer.json"
    ) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_str(content)
            self._decoder = json.loads(content).get("decoder") or {}
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library panics outside of Exception
            raise CheckpointError(
                f"{origin} is not a tokenizer that this version of `tokenizers` can read "
                f"({str(error)[:200]}); download it again."
            ) from None
        # Some files carry the cut and the padding of their training run.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.config = config
        self.special_tokens = _special_tokens(config)
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._bytes_of = lru_cache(maxsize=65536)(self._token_bytes)

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """The tokenizer of a checkpoint folder; None if it has no tokenizer.json."""
        if not os.path.lexists(folder / FILE):
            return None
        path = member(folder, FILE)
        config = read_optional_json(folder, "tokenizer_config.json")
        for name, value in read_optional_json(folder, "special_tokens_map.json").items():
            config.setdefault(name, value)
        return cls(read_text(path, MAX_FILE_BYTES), config, str(folder / FILE))

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def bos_token_id(self) -> int | None:
        """The id of the configured beginning-of-sequence token."""
        return self.token_id(self.special_tokens.get("bos_token", ""))

    @property
    def eos_token_id(self) -> int | None:
        """The id of the configured end-of-sequence token."""
        return self.token_id(self.special_tokens.get("eos_token", ""))

    def to_json(self) -> str:
        """The content of a tokenizer.json that stands for this tokenizer."""
        content: str = self._backend.to_str()
        return content

    def token_id(self, token: str) -> int | None:
        """The id of a token's exact spelling."""
        token_id: int | None = self._backend.token_to_id(token) if token else None
        return token_id

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens that the file's post-processor adds."""
        if not isinstance(text, str):
            raise UsageError(f"a text is expected, not a {type(text).__name__}.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text is not valid Unicode: there is half of a surrogate pair at character "
                f"{error.start}; remove it."
            ) from None
        if len(text) < _LONG_TEXT:
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        else:  # lets other threads run meanwhile, and keeps no places of tokens in the text
            (encoding,) = self._backend.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids that the tokenizer does not know are left out."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A decoder of one growing sequence; its pieces joined equal `decode` of all tokens."""
        skipped = self._special_ids if skip_special_tokens else frozenset()
        kinds = _decoder_kinds(self._decoder)
        if kinds == ["ByteLevel"]:
            return ByteLevelDetokenizer(lambda i: b"" if i in skipped else self._bytes_of(i))
        fallback = "ByteFallback" in kinds
        return WindowDetokenizer(
            lambda ids: self.decode(ids, skip_special_tokens=False),
            lambda i: i in skipped or self._backend.id_to_token(i) is None,
            lambda i: fallback and self._is_byte(i),
            hold_replacement="ByteLevel" in kinds,
        )

    def _is_byte(self, token_id: int) -> bool:
        return _BYTE_TOKEN.fullmatch(self._backend.id_to_token(token_id) or "") is not None

    def _token_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else token_bytes(token)


def _decoder_kinds(decoder: dict[str, Any]) -> list[str]:
    if decoder.get("type") == "Sequence":
        return [kind for part in decoder.get("decoders", ()) for kind in _decoder_kinds(part)]
    return [str(decoder.get("type"))]


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The named special tokens, each written as a string or as {"content": string}."""
    named = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            named[name] = value
    return named
