"""A packed image as a file: the bytes, then what they are and a checksum of every chunk.

Layout: image | JSON meta | sha256 of the meta (32 bytes) | its length (8 bytes) | magic (8 bytes).

What is verified: the sha256 of the meta and the length of the file at once, and every byte of the
image by the checksum of its chunk: the
CRC-32 of the 64-bit sums of its 512-byte sectors, five times as fast as a CRC-32 of the bytes. It
finds torn writes, flipped bits and sectors that were zeroed or swapped. It is no protection against
somebody who changes the file on purpose; the cache folder is private to its user for that.
"""

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from flashformer.plan.pack import Image, Progress

MAGIC = b"FFIMAGE2"
TRAILER_BYTES = 32 + 8 + len(MAGIC)
CHUNK_BYTES = 1 << 24
PIECE_BYTES = 1 << 20  # of one system call, and of one step of a checksum
SECTOR_BYTES = 512
POPULATE = getattr(mmap, "MAP_POPULATE", 0)  # Linux: all pages at once, not a fault for each
THREADS = 2


def write_image(
    path: Path, image: Image, meta: dict[str, Any], progress: Progress | None = None
) -> None:
    """Write `image` and `meta` to a new file and flush it to the disk. Raises `OSError`."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:

        def write_chunk(start: int) -> int:
            crc = 0
            for piece, offset in _pieces(image, start):
                crc = _checksum(piece, crc)
                _write_all(handle, piece, offset)
            return crc

        sums = _each_chunk("writing the image", write_chunk, image.nbytes, progress)
        text = json.dumps({**meta, "image_bytes": image.nbytes, "checksums": sums}).encode()
        trailer = hashlib.sha256(text).digest() + len(text).to_bytes(8, "little") + MAGIC
        _write_all(handle, np.frombuffer(text + trailer, np.uint8), image.nbytes)
        os.fsync(handle)
    finally:
        os.close(handle)


def map_image(
    path: Path, nbytes: int, meta: dict[str, Any], progress: Progress | None = None
) -> Image | None:
    """The image in the file, mapped read-only; None unless it is whole and of this `meta`.

    Nothing is copied: processes share the pages, and those in the system's file cache need not be
    read again. The file may be replaced or removed meanwhile. Raises `OSError`.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        stored = _read_meta(handle)
        if stored is None or stored != {**stored, **meta, "image_bytes": nbytes}:
            return None
        memory = mmap.mmap(handle, 0, mmap.MAP_PRIVATE | POPULATE, mmap.PROT_READ)
    finally:
        os.close(handle)
    image = np.frombuffer(memory, np.uint8)[:nbytes]
    sums = stored["checksums"]

    def check_chunk(start: int) -> bool:
        crc = 0
        for piece, _ in _pieces(image, start):
            crc = _checksum(piece, crc)
        return crc == int(sums[start // CHUNK_BYTES])

    return image if all(_each_chunk("reading the image", check_chunk, nbytes, progress)) else None


def _each_chunk(
    what: str, work: Callable[[int], Any], nbytes: int, progress: Progress | None
) -> list[Any]:
    results = []
    with ThreadPoolExecutor(THREADS, thread_name_prefix="image") as threads:
        for result in threads.map(work, range(0, nbytes, CHUNK_BYTES)):
            results.append(result)
            if progress is not None:
                progress(what, min(len(results) * CHUNK_BYTES, nbytes), nbytes)
    return results


def _checksum(piece: Image, crc: int) -> int:
    """`crc` continued by the sums of the sectors of `piece`, and by the bytes after the last."""
    whole = piece.nbytes // SECTOR_BYTES * SECTOR_BYTES
    words = piece[:whole].view(np.uint64).reshape(-1, SECTOR_BYTES // 8)
    crc = zlib.crc32(np.add.reduce(words, axis=1).data, crc)
    return zlib.crc32(piece[whole:].data, crc)


def _pieces(image: Image, start: int) -> list[tuple[Image, int]]:
    """The pieces of the chunk at `start`, with their offsets."""
    end = min(start + CHUNK_BYTES, image.nbytes)
    return [(image[at : min(at + PIECE_BYTES, end)], at) for at in range(start, end, PIECE_BYTES)]


def _read_meta(handle: int) -> dict[str, Any] | None:
    size = os.fstat(handle).st_size
    trailer = os.pread(handle, TRAILER_BYTES, max(size - TRAILER_BYTES, 0))
    if len(trailer) != TRAILER_BYTES or not trailer.endswith(MAGIC):
        return None
    length = int.from_bytes(trailer[32:40], "little")
    start = size - TRAILER_BYTES - length
    text = os.pread(handle, length, start) if 0 <= start < size else b""
    if hashlib.sha256(text).digest() != trailer[:32]:
        return None
    meta: dict[str, Any] = json.loads(text)
    return meta if meta["image_bytes"] == start else None


def _write_all(handle: int, piece: Image, offset: int) -> None:
    done = 0
    while done < piece.nbytes:
        done += os.pwrite(handle, piece.data[done:], offset + done)
