"""Where packed images and compiled kernels are kept between runs.

Content keys -> files and folders, each written beside its place and renamed when it is whole, under
a lock of its own. Nothing here is needed for a right result: where the cache cannot be written, one
warning says so and the work is done again each time.
"""

import atexit
import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashformer.codegen.image_file import map_image, write_image
from flashformer.errors import OutOfMemoryError
from flashformer.model.weights import WeightSource
from flashformer.plan.pack import Image, IncompressibleError, Progress, pack
from flashformer.plan.plan import Plan

KINDS = ("images", "kernels")  # the cache's folders
IMAGE_SUFFIX = ".image"
VERDICT_SUFFIX = ".plain"  # in place of an image: the matrices that its formats do not fit
HUGE_PAGE_BYTES = 2 << 20
SPARE_BYTES = 256 << 20  # an image is not stored if less than this would stay free on the disk


class CacheWarning(UserWarning):
    """The cache could not be used; the message is one sentence. Results are not affected."""


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One image or compiled kernel in the cache."""

    kind: str  # images | kernels
    name: str
    path: Path
    nbytes: int
    idle_seconds: float  # since it was last used


def cache_dir() -> Path:
    """The cache's folder: FLASHFORMER_CACHE_DIR, else flashformer in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("FLASHFORMER_CACHE_DIR")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    if shared and Path(shared).is_absolute():
        return Path(shared) / "flashformer"
    try:
        return Path.home() / ".cache" / "flashformer"
    except RuntimeError:  # no HOME and no entry in the password file
        return Path(tempfile.gettempdir()) / f"flashformer-{os.getuid()}"


def allocate_image(nbytes: int) -> Image:
    """Zeroed memory for an image, from a 2 MB boundary, with huge pages where the system has them.

    It is freed when the last view of it is. Raises `OutOfMemoryError`.
    """
    try:
        memory = mmap.mmap(-1, max(nbytes, 1) + HUGE_PAGE_BYTES)
    except OSError as error:
        raise OutOfMemoryError(
            f"There is no room for the packed weights of {nbytes / 2**30:.2f} GiB: "
            f"{error.strerror}; choose a smaller format with --quant."
        ) from error
    with contextlib.suppress(AttributeError, OSError):  # neither macOS nor every kernel has it
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE_BYTES
    return whole[start : start + nbytes]


def load_image(
    plan: Plan,
    weights: WeightSource,
    progress: Progress | None = None,
) -> Image:
    """The packed image of `plan` and `weights`: mapped from the cache, or packed into memory now.

    `progress` is called as (what, bytes done, bytes in all). Raises what `pack.pack` raises, an
    `IncompressibleError` again without packing; a cache that is damaged, read-only or full costs a
    `CacheWarning` and time.
    """
    key = _digest([plan.image_key, weights.fingerprint])
    meta = {"key": key, "fingerprint": weights.fingerprint}
    options = plan.options
    name = f"{plan.spec.model_type}-{options.format}-{options.head_format}-{key[:24]}"
    path = cache_dir() / "images" / (name + IMAGE_SUFFIX)
    verdict = path.with_suffix(VERDICT_SUFFIX)
    _sweep("images")
    _raise_known(verdict)
    image = _map(path, plan.image_bytes, meta, progress)
    if image is not None:
        return image
    with _entry_lock(path) as usable:
        # Another process may have packed it while this one waited for the lock.
        image = _map(path, plan.image_bytes, meta, progress) if usable else None
        if image is not None:
            return image
        image = allocate_image(plan.image_bytes)
        try:
            pack(plan, weights, image, progress)
        except IncompressibleError as found:
            if usable:
                _store_verdict(verdict, found)
            raise
        if usable:
            _store(path, image, meta, progress)
    return image


def compiled(kind: str, key_parts: Sequence[str | bytes], build: Callable[[Path], None]) -> Path:
    """The folder of a compiled kernel: cached under the hash of `key_parts`, or built now.

    `build(folder)` fills an empty folder; what it raises passes through and leaves nothing behind.
    `kind` (a short word such as the backend and architecture) starts the folder's name. Where the
    cache cannot be used, the folder is a temporary one that lives as long as the process.
    """
    path = _kernel_path(kind, key_parts)
    _sweep("kernels")
    if is_compiled(kind, key_parts):
        with contextlib.suppress(OSError):
            _touch(path)
            return path
    with _entry_lock(path) as usable:
        if usable and _build_in_cache(path, build):
            return path
    folder = Path(tempfile.mkdtemp(prefix="flashformer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build(folder)
    return folder


def is_compiled(kind: str, key_parts: Sequence[str | bytes]) -> bool:
    """Whether `compiled` would find this kernel in the cache."""
    path = _kernel_path(kind, key_parts)
    with contextlib.suppress(OSError):
        return path.is_dir() and _is_private(path.parent)
    return False


def entries() -> list[CacheEntry]:
    """Everything in the cache, the longest unused first."""
    found = []
    for kind in KINDS:
        for path in _listing(kind):
            if path.suffix not in (".lock", ".tmp"):
                with contextlib.suppress(OSError):  # removed by somebody else meanwhile
                    name = path.name.removesuffix(IMAGE_SUFFIX)
                    idle = max(time.time() - path.stat().st_mtime, 0.0)
                    found.append(CacheEntry(kind, name, path, _size(path), idle))
    return sorted(found, key=lambda entry: -entry.idle_seconds)


def clear(kind: str | None = None) -> tuple[int, int]:
    """Remove all entries (of one kind): how many and their bytes. Entries being made are left.

    Raises `OSError` if one cannot be removed.
    """
    removed = nbytes = 0
    for entry in entries():
        if kind in (None, entry.kind):
            with _locked(_beside(entry.path, ".lock"), wait=False) as held:
                if held:
                    _remove(entry.path)
                    removed, nbytes = removed + 1, nbytes + entry.nbytes
    for folder in KINDS if kind is None else (kind,):
        _sweep(folder)
    return removed, nbytes


def _kernel_path(kind: str, key_parts: Sequence[str | bytes]) -> Path:
    return cache_dir() / "kernels" / f"{kind}-{_digest(key_parts)[:24]}"


def _map(path: Path, nbytes: int, meta: dict[str, str], progress: Progress | None) -> Image | None:
    try:
        image = map_image(path, nbytes, meta, progress)
        if image is not None:
            _touch(path)
            return image
        _warn(f"The cached image {path} is damaged; the weights are packed again")
    except (FileNotFoundError, NotADirectoryError):  # the latter is reported on writing
        pass
    except OSError as error:
        _warn(f"The cached image {path} cannot be read ({error.strerror}); packing again")
    return None


def _store(path: Path, image: Image, meta: dict[str, str], progress: Progress | None) -> None:
    """Write the image beside its place and rename it; a failure is a warning."""
    unfinished = _beside(path, ".tmp")
    try:
        free = shutil.disk_usage(path.parent).free
        if free < image.nbytes + SPARE_BYTES:
            need = f"{image.nbytes / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB free"
            _warn(f"The packed weights are not cached in {path.parent}: {need} on the disk")
            return
        write_image(unfinished, image, meta, progress)
        unfinished.replace(path)
        _flush(path.parent)
    except OSError as error:
        _warn(f"The packed weights are not cached in {path.parent}: {error.strerror}")
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _raise_known(verdict: Path) -> None:
    """Raise the `IncompressibleError` that packing raised before, unless its record is damaged."""
    try:
        matrices = tuple((str(name), int(layer)) for name, layer in json.loads(verdict.read_text()))
    except (OSError, ValueError, TypeError):
        return
    with contextlib.suppress(OSError):
        _touch(verdict)
    raise IncompressibleError(matrices)


def _store_verdict(verdict: Path, found: IncompressibleError) -> None:
    unfinished = _beside(verdict, ".tmp")
    try:
        unfinished.write_text(json.dumps(found.matrices))
        unfinished.replace(verdict)
    except OSError as error:
        _warn(f"The cache {verdict.parent} cannot be written ({error.strerror}): working without")


def _build_in_cache(path: Path, build: Callable[[Path], None]) -> bool:
    """Build under the entry's lock; False after a warning if the folder cannot be used."""
    try:
        if not _is_private(path.parent):
            raise PermissionError(errno.EPERM, "others may write to it")
        if not path.is_dir():  # another process may have built it meanwhile
            _build(path, build)
        return True
    except OSError as error:
        _warn(
            f"The kernel cache {path.parent} cannot be used ({error.strerror}): "
            "the kernel is compiled at every start"
        )
        return False


def _build(path: Path, build: Callable[[Path], None]) -> None:
    unfinished = _beside(path, ".tmp")
    _remove(unfinished)
    unfinished.mkdir(mode=0o700)
    try:
        build(unfinished)
        for file in unfinished.rglob("*"):
            _flush(file)
        unfinished.rename(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def _entry_lock(path: Path) -> Iterator[bool]:
    """Hold the lock of one entry, in folders made for it; yields False if there can be none."""
    with contextlib.ExitStack() as stack:
        usable = False
        try:
            path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            usable = stack.enter_context(_locked(_beside(path, ".lock"), wait=True))
        except OSError as error:
            _warn(f"The cache {path.parent} cannot be written ({error.strerror}): working without")
        yield usable


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock on a file, which is removed at the end; yields whether it is held.

    The system frees the lock of a process that dies: a lock file that was left means nothing.
    """
    handle = _acquire(path, wait)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            os.close(handle)


def _acquire(path: Path, wait: bool) -> int | None:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # The holder before us removed the file: a lock on it excludes nobody any more.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _sweep(kind: str) -> None:
    """Remove what a killed process left unfinished: its lock is free."""
    for path in _listing(kind):
        if path.suffix in (".lock", ".tmp"):
            with (
                contextlib.suppress(OSError),
                _locked(path.with_suffix(".lock"), wait=False) as held,
            ):
                if held:
                    _remove(path.with_suffix(".tmp"))


def _listing(kind: str) -> list[Path]:
    try:
        return sorted((cache_dir() / kind).iterdir())
    except OSError:
        return []


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files if f.is_file())


def _is_private(folder: Path) -> bool:
    """Whether only this user can have put code into `folder`."""
    status = folder.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):  # a read-only cache serves as well
        os.utime(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(parts: Sequence[str | bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()


def _warn(sentence: str) -> None:
    warnings.warn(f"{sentence}.", CacheWarning, stacklevel=3)
