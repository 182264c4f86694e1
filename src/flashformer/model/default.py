"""The embedded default model: a small Llama that has learnt from Python's sources and manuals.

Cache folder -> checkpoint folder. The package holds int8 weights (default_model/README.md is the
model card); a folder in HF's layout, in bf16, is made from them once.
"""

import shutil
import uuid
from pathlib import Path

import ml_dtypes

from flashformer.errors import CheckpointError

PACKAGED = Path(__file__).parent / "default_model"
HELD_OUT = PACKAGED / "held_out.txt"  # text of the same kind that the model has not seen
PACKED_WEIGHTS = "weights.safetensors"
COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
FOLDER = "default-model-4"  # raise the number whenever a packaged file changes


def default_checkpoint(cache_dir: Path) -> Path:
    """The folder of the default checkpoint below `cache_dir`, made there if it is missing.

    Deterministic, needs no network. Concurrent callers are safe: each writes beside the final
    folder and renames; the first wins. Raises `CheckpointError` when the folder cannot be written.
    """
    folder = cache_dir / FOLDER
    if folder.is_dir():
        return folder
    draft = cache_dir / f"{FOLDER}.{uuid.uuid4().hex}"
    try:
        draft.mkdir(parents=True)
        for name in COPIED:
            shutil.copyfile(PACKAGED / name, draft / name)
        _unpack_weights(PACKAGED / PACKED_WEIGHTS, draft / "model.safetensors")
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same bytes
                raise
    except OSError as error:
        raise CheckpointError(
            f"The default model cannot be written to {cache_dir}: {error.strerror}; set "
            "FLASHFORMER_CACHE_DIR to a folder with 25 MB of room."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _unpack_weights(packed: Path, path: Path) -> None:
    """int8 codes [rows, cols] times float32 scales [rows], rounded to bf16; vectors as they are."""
    from safetensors.numpy import load_file, save_file

    stored = load_file(packed)
    tensors = {}
    for name, values in stored.items():
        matrix = name.removesuffix(".codes")
        if matrix != name:
            scaled = values * stored[f"{matrix}.scales"][:, None]
            tensors[matrix] = scaled.astype(ml_dtypes.bfloat16)
        elif not name.endswith(".scales"):
            tensors[name] = values.astype(ml_dtypes.bfloat16)
    save_file(tensors, path, {"format": "pt"})
