"""Measures how long a model takes from its files to its first token: new to the cache, and known.

python benchmarks/startup.py [--shape llama-3.1-8b] [--device cuda] [-o FILE]

Writes a checkpoint of random weights, so that its files lie in the page cache, and loads it in
processes of their own: once with an empty cache of ours, then with what that has left.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from flashformer.codegen.cache import cache_dir
from flashformer.model.default import COPIED, default_checkpoint
from flashformer.model.roles import locate
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import RandomWeights, every_role
from flashformer.serve.benchmark.provenance import COMMIT_HELP
from result_file import begin, new_path, save

PROMPT = tuple(range(10, 18))
# seconds; the last one with all files in the page cache
LIMITS = {"compile": 20.0, "compile_known": 1.0, "load_known": 20.0}


def main() -> None:
    """Measure and write one result file; exit 1 if a limit is missed."""
    options = parse_arguments()
    if options.load:
        print(json.dumps(load(options.load, options.device)))
        return
    result = begin("startup", options.commit)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        checkpoint, cache = Path(folder) / "checkpoint", Path(folder) / "cache"
        nbytes = write_checkpoint(checkpoint, options.shape)
        runs = [measured(checkpoint, cache, options.device) for _ in range(1 + options.times)]
    found = summary(runs)
    result |= {"shape": options.shape, "bytes": nbytes, **found}
    result["gpu" if options.device == "cuda" else "cpu"] = {"name": runs[0]["machine"]}
    result["runs"] = runs
    path = options.output or new_path(runs[0]["machine"], f"{options.shape}-startup")
    save(path, result)
    print(json.dumps(found, indent=1))
    raise SystemExit(not found["passed"])


def parse_arguments() -> argparse.Namespace:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-3.1-8b", help="of model/shapes.py")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--times", type=int, default=3, help="loads of the known model")
    parser.add_argument("--folder", help="for the checkpoint and its image (default: /tmp)")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--commit", help=COMMIT_HELP)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_checkpoint(folder: Path, shape: str) -> int:
    """Random bf16 weights in HF's layout, a file a layer, with a small tokenizer; their bytes."""
    folder.mkdir(parents=True)
    for name in COPIED[1:]:
        shutil.copyfile(default_checkpoint(cache_dir()) / name, folder / name)
    (folder / "config.json").write_text(json.dumps({**SHAPES[shape], "torch_dtype": "bfloat16"}))
    spec = ModelSpec.from_hf(SHAPES[shape])
    weights, files, total = RandomWeights(spec), {}, 0
    for layer in range(-1, spec.num_layers):
        roles = [role for at, role in every_role(spec) if at == layer]
        tensors = {locate(spec, r, layer).name: weights.tensor(r, layer) for r in roles}
        name = f"model-{layer + 1:05d}.safetensors"
        total += write_tensors(folder / name, tensors)
        files |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_tensors(path: Path, tensors: dict[str, Any]) -> int:
    """A safetensors file; the tensors may be views of each other."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        first, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).view(np.uint16).data)
    return end


def measured(checkpoint: Path, cache: Path, device: str) -> dict[str, Any]:
    """One process that loads the model and draws a token."""
    command = [sys.executable, __file__, "--load", str(checkpoint), "--device", device]
    environment = {**os.environ, "FLASHFORMER_CACHE_DIR": str(cache)}
    started = time.perf_counter()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"loading failed: {ended.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(ended.stdout)
    return {**found, "process_s": time.perf_counter() - started}


def load(checkpoint: Path, device: str) -> dict[str, Any]:
    """Seconds of a load's parts, as its progress tells them, and of the first token behind it."""
    started = time.perf_counter()
    from flashformer import LLM, SamplingParams

    imported = time.perf_counter()
    parts: dict[str, list[float]] = {}

    def progress(what: str, done: int, total: int) -> None:
        parts.setdefault(what, []).append(time.perf_counter())

    llm = LLM(checkpoint, device=device, context=1024, progress=progress)
    loaded = time.perf_counter()
    prompt = {"prompt_token_ids": list(PROMPT)}
    llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    return {
        "machine": llm.plan.machine.name,
        "import_s": imported - started,
        "load_s": loaded - imported,
        "parts_s": {what: times[-1] - times[0] for what, times in parts.items()},
        "first_token_s": time.perf_counter() - loaded,
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The new model, the median of the known one, and whether the limits hold."""
    new, known = runs[0], runs[1:]
    seconds = {
        "compile": new["parts_s"].get("compiling", 0.0),
        "load": new["load_s"],
        "compile_known": median(run["parts_s"].get("compiling", 0.0) for run in known),
        "load_known": median(run["load_s"] for run in known),
        "first_token_known": median(run["process_s"] for run in known),
    }
    passed = all(seconds[what] <= limit for what, limit in LIMITS.items())
    return {"passed": passed, "seconds": seconds, "limits": LIMITS}


if __name__ == "__main__":
    main()
