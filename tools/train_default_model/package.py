"""A refined checkpoint -> the files that the package ships: int8 weights, tokenizer, licences.

`python package.py REFINED DATA [PACKAGE]`: REFINED is what refine.py wrote, DATA is what data.py
wrote. The model card, README.md of PACKAGE, is written by hand.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

PACKAGE = Path(__file__).parents[2] / "src" / "flashformer" / "model" / "default_model"
AS_THEY_ARE = ("config.json", "tokenizer.json", "tokenizer_config.json")
INT8_MAX = 127


def quantise(weights: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Matrices as int8 codes [rows, cols] and float32 scales [rows], vectors as float32."""
    packed = {}
    for name, weight in weights.items():
        values = weight.float().numpy()
        if values.ndim == 1:
            packed[name] = values
            continue
        scales = np.abs(values).max(axis=1) / np.float32(INT8_MAX)
        packed[f"{name}.codes"] = np.rint(values / scales[:, None]).astype(np.int8)
        packed[f"{name}.scales"] = scales
    return packed


def package(refined: Path, data: Path, out: Path) -> None:
    """Write everything but the model card into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    weights: dict[str, torch.Tensor] = {}
    for shard in sorted(refined.glob("*.safetensors")):
        weights.update(load_file(shard))
    file = out / "weights.safetensors"
    save_file(quantise(weights), file)
    file.chmod(0o644)
    for name in AS_THEY_ARE:
        shutil.copyfile(refined / name, out / name)
    ends = json.loads((refined / "generation_config.json").read_text())
    generation = {name: ends[name] for name in ("bos_token_id", "eos_token_id")}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    shutil.copyfile(refined / "training.json", out / "training.json")
    for name in ("LICENSES.txt", "held_out.txt"):
        shutil.copyfile(data / name, out / name)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("refined", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("package", type=Path, nargs="?", default=PACKAGE)
    given = parser.parse_args()
    package(given.refined, given.data, given.package)
    total = sum(file.stat().st_size for file in given.package.iterdir())
    print(f"{given.package}: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
