"""Compares FlashFormer with llama.cpp on one machine, in turns, on random weights of one shape.

python benchmarks/compare_llama_cpp.py --llama-bench PATH --folder DIR [--shape llama-3.2-1b]

Every round runs FlashFormer, then llama-bench, so that a slow minute of the machine falls on both.
`--folder` receives the GGUF files (gigabytes) and keeps them for the next run. The result is a new
JSON file in `benchmarks/results`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from random_gguf import write_gguf
from result_file import begin, new_path, save

PEER_FORMATS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


def main() -> None:
    """Measure every format in turns and write one result file."""
    options = parse_arguments(__doc__)
    result = {**begin_beside("comparison", options), "pairs": []}
    for weight_format in options.formats.split(","):
        result["pairs"].append(compare(options, weight_format))
        print(json.dumps(result["pairs"][-1]["ratio"]), flush=True)
    path = options.output or new_path(result["system"]["cpu"], f"{options.shape}-vs-llama.cpp")
    save(path, result)
    print(path)


def parse_arguments(description: str | None) -> argparse.Namespace:
    """The command line of the scripts that measure beside llama.cpp."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--llama-bench", type=Path, required=True, help="the built program")
    parser.add_argument("--folder", type=Path, required=True, help="where GGUF files are kept")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--formats", default="bf16,int8,int4", help="of " + ",".join(PEER_FORMATS))
    parser.add_argument("-p", "--prompt", type=int, default=128)
    parser.add_argument("-n", "--generate", type=int, default=64)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args()


def begin_beside(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """A result of ours and of the peer."""
    return {
        **begin(kind),
        "peer": {"name": "llama.cpp", "version": peer_version(options.llama_bench)},
        "model": {"name": options.shape, "weights": "random"},
        "threads": options.threads,
    }


def compare(options: argparse.Namespace, weight_format: str) -> dict[str, Any]:
    """All rounds of one format: samples of both sides, medians and their ratio."""
    path = gguf_file(options, weight_format)
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, float]] = []
    loads: list[float] = []  # of the last minute: above the number of threads, others were busy
    for _ in range(options.rounds):
        loads.append(round(os.getloadavg()[0], 2))
        ours.append(run_flashformer(options, weight_format))
        theirs.append(run_llama_bench(options, path))
    tests = [row["test"] for row in ours[0]["rows"]]
    samples = {
        test: {
            "flashformer": [row_of(run, test)["tok_s"] for run in ours],
            "llama.cpp": [run[test] for run in theirs],
        }
        for test in tests
    }
    medians = {t: {who: median(s) for who, s in sides.items()} for t, sides in samples.items()}
    return {
        "format": weight_format,
        "peer_format": PEER_FORMATS[weight_format],
        "tok_s": medians,
        "ratio": {t: m["flashformer"] / m["llama.cpp"] for t, m in medians.items()},
        "read_gb_s": median(run["machine"]["read_gb_s"] for run in ours),
        "share": {t: median(row_of(run, t)["share"] for run in ours) for t in tests},
        "load_before_each_round": loads,
        "samples": samples,
        "flashformer_runs": ours,
    }


def gguf_file(options: argparse.Namespace, weight_format: str) -> Path:
    """The peer's model of this shape and format, written at the first use."""
    path: Path = options.folder / f"{options.shape}-{PEER_FORMATS[weight_format]}.gguf"
    if not path.exists():
        options.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        spec = ModelSpec.from_hf(SHAPES[options.shape])
        write_gguf(part, spec, PEER_FORMATS[weight_format])
        part.rename(path)
    return path


def row_of(run: dict[str, Any], test: str) -> dict[str, Any]:
    """The row of a test in one FlashFormer run."""
    return next(row for row in run["rows"] if row["test"] == test)


def run_flashformer(options: argparse.Namespace, weight_format: str) -> dict[str, Any]:
    """One `flashformer bench`, as JSON."""
    lengths = ["-p", str(options.prompt), "-n", str(options.generate)]
    command = [sys.executable, "-m", "flashformer", "bench", "--model-shape", options.shape]
    command += ["--quant", weight_format, "-t", str(options.threads), "-r", "1", "--json", *lengths]
    return dict(json.loads(subprocess.check_output(command)))


def run_llama_bench(options: argparse.Namespace, path: Path) -> dict[str, float]:
    """Tokens a second of one `llama-bench`, by test."""
    lengths = ["-p", str(options.prompt), "-n", str(options.generate)]
    command = [str(options.llama_bench), "-m", str(path), "-t", str(options.threads), *lengths]
    output = subprocess.check_output([*command, "-r", "1", "-o", "json"])
    return {
        f"pp{run['n_prompt']}" if run["n_prompt"] else f"tg{run['n_gen']}": run["avg_ts"]
        for run in json.loads(output)
    }


def peer_version(program: Path) -> str:
    """What the peer says about itself."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return next((line for line in lines if "version" in line), lines[0] if lines else "unknown")


if __name__ == "__main__":
    main()
