"""One .safetensors file: its header checked, its bytes memory-mapped.

Path -> `SafetensorsFile`. Format: https://huggingface.co/docs/safetensors.
"""

import hashlib
import json
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

from flashformer.errors import CheckpointError
from flashformer.model.hf_config import is_int, quote

MAX_HEADER_BYTES = 32 << 20  # the largest public checkpoints need less than 1 MB a shard
MAX_DIMS = 8
DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What the header says about one tensor; its bytes lie inside the file."""

    dtype: str  # safetensors' name: BF16, F16, F32, or one that cannot be read as weights
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A checked file. Views of its tensors stay valid as long as they are referenced."""

    path: Path
    size: int
    mtime_ns: int
    header_digest: str
    entries: dict[str, TensorEntry]
    mapping: mmap.mmap

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """A read-only view of a tensor's bytes in its shape.

        A copy where the file does not align it. Raises `CheckpointError` for a dtype other than
        BF16, F16, F32.
        """
        entry = self.entries[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: {name} has dtype {entry.dtype}; expected {', '.join(DTYPES)}."
            )
        count = math.prod(entry.shape)
        flat = np.frombuffer(self.mapping, dtype, count, entry.offset)
        if not flat.flags.aligned:
            flat = flat.copy()
            flat.flags.writeable = False
        return flat.reshape(entry.shape)

    def release(self, name: str, first_row: int = 0, num_rows: int | None = None) -> None:
        """Give the pages of some rows back to the system; reading them again reads the file."""
        entry = self.entries[name]
        rows = entry.shape[0] if entry.shape else 1
        row_bytes = entry.nbytes // max(rows, 1)
        last_row = rows if num_rows is None else min(first_row + num_rows, rows)
        start = entry.offset + first_row * row_bytes
        stop = entry.offset + last_row * row_bytes
        start -= start % mmap.PAGESIZE
        if start < stop and hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)


def open_safetensors(path: Path) -> SafetensorsFile:
    """Check and map a file. Raises `CheckpointError` for anything but a whole, sound file."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            header = _read_header(path, file, status.st_size)
            entries = _read_entries(path, header, 8 + len(header), status.st_size)
            _check_with_library(path)
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    digest = hashlib.sha256(header).hexdigest()
    return SafetensorsFile(path, status.st_size, status.st_mtime_ns, digest, entries, mapping)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}; the file is damaged, so download it again.")


def _read_header(path: Path, file: BinaryIO, size: int) -> bytes:
    length = file.read(8)
    header_bytes = int.from_bytes(length, "little")
    if len(length) < 8 or header_bytes > size - 8:
        raise _damaged(path, f"has {size} bytes and ends inside its header")
    if not 2 <= header_bytes <= MAX_HEADER_BYTES:
        raise _damaged(path, f"claims a header of {header_bytes} bytes")
    return file.read(header_bytes)


def _read_entries(path: Path, header: bytes, start: int, size: int) -> dict[str, TensorEntry]:
    try:
        table = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "has a header that is no JSON") from error
    if not isinstance(table, dict):
        raise _damaged(path, "has a header that is no JSON object")
    table.pop("__metadata__", None)
    return {name: _read_entry(path, name, entry, start, size) for name, entry in table.items()}


def _read_entry(path: Path, name: str, entry: object, start: int, size: int) -> TensorEntry:
    what = f"has a wrong header entry for {quote(name)}"
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise _damaged(path, what)
    dtype, shape, offsets = entry["dtype"], entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise _damaged(path, what)
    if len(offsets) != 2 or len(shape) > MAX_DIMS or not all(map(is_int, shape + offsets)):
        raise _damaged(path, what)
    first, last = offsets
    if min(shape + offsets) < 0 or last < first:
        raise _damaged(path, what)
    if start + last > size:
        raise _damaged(path, f"has {size} bytes, but {quote(name)} ends at byte {start + last}")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != last - first:
        raise _damaged(
            path, f"gives {last - first} bytes to {quote(name)} of shape {shape}, {dtype}"
        )
    return TensorEntry(dtype, tuple(shape), start + first, last - first)


def _check_with_library(path: Path) -> None:
    """The format's own checks: tensors without gaps or overlaps, nothing after the last."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise _damaged(path, f"is not a sound safetensors file ({reason})") from error
