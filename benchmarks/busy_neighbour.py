"""Measures what an endless loop on one core costs FlashFormer and llama.cpp.

python benchmarks/busy_neighbour.py --llama-bench PATH --folder DIR [--shape smollm2-135m]

Every round decodes four times: each engine alone, then beside the loop, which is bound to the
first core. A fair scheduler gives the loop half of that core; threads that wait for each other at
barriers can lose far more. The result is a new JSON file in `benchmarks/results`.
"""

import contextlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from statistics import median

from compare_llama_cpp import (
    begin_beside,
    gguf_file,
    parse_arguments,
    run_flashformer,
    run_llama_bench,
)
from result_file import new_path, save

LOOP = "while True: pass"


def main() -> None:
    """Measure the first of the formats and write one result file."""
    options = parse_arguments(__doc__)
    weight_format = options.formats.split(",")[0]
    options.prompt = 0
    result = {
        **begin_beside("neighbour", options),
        "format": weight_format,
        "neighbour": f"python -c '{LOOP}' on the first core",
        "samples": samples(options, weight_format),
    }
    result["kept"] = {
        engine: median(found["beside"]) / median(found["alone"])
        for engine, found in result["samples"].items()
    }
    what = f"{options.shape}-vs-llama.cpp-neighbour"
    path = options.output or new_path(result["system"]["cpu"], what)
    save(path, result)
    print(json.dumps(result["kept"]), path, sep="\n")


def samples(options: Namespace, weight_format: str) -> dict[str, dict[str, list[float]]]:
    """Tokens a second of each engine, alone and beside the loop."""
    path = gguf_file(options, weight_format)
    found: dict[str, dict[str, list[float]]] = {
        engine: {"alone": [], "beside": []} for engine in ("flashformer", "llama.cpp")
    }
    for _ in range(options.rounds):
        for case, neighbour in (("alone", contextlib.nullcontext()), ("beside", busy_core())):
            with neighbour:
                ours = run_flashformer(options, weight_format)
                theirs = run_llama_bench(options, path)
            found["flashformer"][case].append(ours["rows"][0]["tok_s"])
            found["llama.cpp"][case].append(theirs[f"tg{options.generate}"])
    return found


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """An endless loop on the first core that this process may use."""
    loop = subprocess.Popen([sys.executable, "-c", LOOP])
    os.sched_setaffinity(loop.pid, {min(os.sched_getaffinity(0))})
    try:
        yield
    finally:
        loop.kill()
        loop.wait()


if __name__ == "__main__":
    main()
