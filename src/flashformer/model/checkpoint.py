"""A checkpoint in HF's layout: configuration, and tensors by name, memory-mapped.

Folder or hub id -> `Checkpoint`.
"""

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from flashformer.errors import CheckpointError, UnsupportedModelError
from flashformer.model.hf_config import quote
from flashformer.model.safetensors_file import SafetensorsFile, TensorEntry, open_safetensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_CONFIG_BYTES = 8 << 20
MAX_INDEX_BYTES = 64 << 20
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
HUB_IGNORED = ["*/*", "consolidated*"]
CHECK_ELEMS = 1 << 20  # of one block of check_finite: stays in the cache
EXPONENTS: dict[str, tuple[npt.DTypeLike, int]] = {  # all ones in NaN and infinity
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
    "float32": (np.uint32, 0x7F800000),
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint; nothing of the weights has been read yet."""

    folder: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]  # empty when the file is absent
    files: tuple[SafetensorsFile, ...]
    file_of: dict[str, SafetensorsFile]  # tensor name -> file
    fingerprint: str  # of config, and of every file's name, size, time and header

    @classmethod
    def open(cls, path_or_hub_id: str | os.PathLike[str]) -> Self:
        """Open a folder, or a model of the HF hub (downloaded once, unless HF_HUB_OFFLINE is set).

        Raises `CheckpointError` for anything missing, damaged or outside the folder.
        """
        folder = find_folder(path_or_hub_id)
        names = _weight_files(folder)  # first: other formats come without a config.json
        config = read_json(folder, "config.json", MAX_CONFIG_BYTES)
        generation_config: dict[str, Any] = {}
        if os.path.lexists(folder / "generation_config.json"):
            generation_config = read_json(folder, "generation_config.json", MAX_CONFIG_BYTES)
        opened = {name: open_safetensors(member(folder, name)) for name in sorted(names)}
        file_of = {
            tensor: opened[name] for name, tensors in names.items() for tensor in tensors
        } or {tensor: file for file in opened.values() for tensor in file.entries}
        _require_members(folder, file_of)
        files = tuple(opened.values())
        return cls(folder, config, generation_config, files, file_of, _fingerprint(config, opened))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self.file_of))

    def entry(self, name: str) -> TensorEntry:
        """Dtype, shape and place of a tensor. Raises `CheckpointError` if there is none."""
        return self._file(name).entries[name]

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """A read-only, memory-mapped view: bfloat16 (ml_dtypes), float16 or float32."""
        return self._file(name).tensor(name)

    def release(self, name: str, first_row: int = 0, num_rows: int | None = None) -> None:
        """Give the memory of a tensor (or of some of its rows) back; it can be read again."""
        self._file(name).release(name, first_row, num_rows)

    def _file(self, name: str) -> SafetensorsFile:
        file = self.file_of.get(name)
        if file is None:
            raise CheckpointError(
                f"{self.folder} has no tensor {quote(name)}; expected a complete checkpoint of "
                f"model_type {quote(self.config.get('model_type'))}."
            )
        return file


def check_finite(array: npt.NDArray[Any], name: str) -> None:
    """Raise `CheckpointError` if any weight is NaN or infinite.

    Tests the exponent bits block by block; needs 2 MB, at the speed of a copy. Pass rows of a
    large tensor and release them between calls to bound the resident memory.
    """
    kind, mask = EXPONENTS[array.dtype.name]
    rows = np.atleast_2d(array)
    step = max(1, CHECK_ELEMS // max(rows.shape[-1], 1))
    for first in range(0, len(rows), step):
        block = np.bitwise_and(rows[first : first + step].view(kind), mask)
        if block.size and block.max() == mask:
            raise CheckpointError(
                f"Tensor {name} holds NaN or infinite weights; the checkpoint is damaged, so "
                "download it again."
            )


def find_folder(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded into huggingface_hub's cache."""
    text = os.fspath(path_or_hub_id)
    if not text or "\0" in text:
        raise CheckpointError(f"{quote(text)} names no checkpoint; expected a folder or a hub id.")
    try:
        folder = Path(text).expanduser()
        if folder.is_dir():
            return folder
        exists = folder.exists()
    except (OSError, RuntimeError):  # a name that is too long, a home that is unknown
        exists = False
    if exists:
        is_gguf = folder.suffix == ".gguf"
        kind = "a GGUF file, which FlashFormer does not read" if is_gguf else "a file"
        raise CheckpointError(
            f"{text} is {kind}; expected the folder that holds config.json and safetensors."
        )
    if not HUB_ID.fullmatch(text):
        raise CheckpointError(
            f"There is no folder {quote(text)}; expected a checkpoint's folder or a hub id such as "
            "Qwen/Qwen3-0.6B."
        )
    return _download(text)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED)
        )
    except GatedRepoError as error:
        why = "is gated: accept its licence on the hub, then run `hf auth login`"
        raise CheckpointError(f"The model {hub_id} {why}.") from error
    except RepositoryNotFoundError as error:
        why = "and the hub has no such model, or it is private"
        raise CheckpointError(f"There is no folder {hub_id}, {why}.") from error
    except LocalEntryNotFoundError as error:
        why = "the hub cannot be reached (or HF_HUB_OFFLINE is set) and its cache has no such model"
        raise CheckpointError(f"There is no folder {hub_id}; {why}.") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"The model {hub_id} cannot be downloaded: {reason}") from error


def member(folder: Path, name: str) -> Path:
    """The path of a regular file of the checkpoint.

    Raises `CheckpointError` for one that is missing, is a device or FIFO, or lies outside the
    folder; only huggingface_hub's cache may link to its own blobs.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise CheckpointError(f"{folder} names the file {quote(name)}; expected one inside it.")
    try:
        real = (folder / name).resolve(strict=True)
        base = folder.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no file {name}; complete the checkpoint.") from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error}.") from error
    roots = [base]
    if base.parent.name == "snapshots":
        roots.append(base.parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise CheckpointError(f"{folder / name} links to {real}; expected a file inside it.")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{folder / name} is no regular file; expected one.")
    return real


def read_json(folder: Path, name: str, max_bytes: int) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint; `CheckpointError` if it is anything else."""
    path = member(folder, name)
    try:
        if path.stat().st_size > max_bytes:
            raise CheckpointError(
                f"{folder / name} is larger than {max_bytes >> 20} MB; expected a small JSON file."
            )
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / name} is no JSON; download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder / name} is no JSON object; download it again.")
    return value


def _weight_files(folder: Path) -> dict[str, list[str]]:
    """File name -> tensors that the index places there; no tensors when there is no index."""
    if os.path.lexists(folder / SINGLE_FILE):
        return {SINGLE_FILE: []}
    if not os.path.lexists(folder / INDEX_FILE):
        raise _no_weights(folder)
    weight_map = read_json(folder, INDEX_FILE, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map; download it again.")
    tensors: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX_FILE} places {quote(tensor)} in {quote(name)}; expected a "
                ".safetensors file."
            )
        tensors.setdefault(name, []).append(tensor)
    return tensors


def _no_weights(folder: Path) -> Exception:
    for pattern, kind in (("*.gguf", "GGUF"), ("*.bin", "pickled"), ("*.pth", "pickled")):
        if next(folder.glob(pattern), None) is not None:
            return UnsupportedModelError(
                f"{folder} holds {kind} weights, which FlashFormer does not read; expected "
                f"{SINGLE_FILE} or {INDEX_FILE}."
            )
    return CheckpointError(
        f"{folder} holds no weights; expected {SINGLE_FILE} or {INDEX_FILE} beside config.json."
    )


def _require_members(folder: Path, file_of: dict[str, SafetensorsFile]) -> None:
    for tensor, file in file_of.items():
        if tensor not in file.entries:
            raise CheckpointError(
                f"{folder / INDEX_FILE} places {quote(tensor)} in {file.path.name}, which does not "
                "hold it; download the checkpoint again."
            )


def _fingerprint(config: dict[str, Any], files: dict[str, SafetensorsFile]) -> str:
    facts = [(name, f.size, f.mtime_ns, f.header_digest) for name, f in files.items()]
    text = json.dumps([config, facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
