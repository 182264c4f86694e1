"""Runs the tests of the CUDA kernel and the sanitizers on a GPU, and writes one result file.

python benchmarks/verify.py -o benchmarks/results/verification/NAME.json
python benchmarks/verify.py --merge PART.json PART.json -o ...: runs of the same sources
python benchmarks/verify.py --compile -o ...: what the assembler says, without a GPU
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashformer.backends.cuda.compile import build_cubin
from flashformer.backends.cuda.machine import Device, find_device, fit_machine
from flashformer.codegen.cuda_header import render_cuda
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.plan.plan import PlanOptions, make_plan
from flashformer.serve.benchmark.provenance import COMMIT_HELP
from record_tests import UNFINISHED, read_tests
from result_file import begin, save

ROOT = Path(__file__).parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TESTS = (
    *("tests/test_cuda_stages.py", "tests/test_cuda_narrow.py", "tests/test_cuda_safety.py"),
    *("tests/test_cuda.py", "tests/test_cuda_sampling.py", "tests/test_prefill_ops.py"),
    *("tests/test_cuda_prefill.py", "tests/test_prefill_attention.py", "tests/test_baselines.py"),
    "tests/test_interrupt.py",
)
WRONG = ("failed", UNFINISHED)
PYTEST_RAN = (0, 1, 5)  # all well, tests failed, no test was asked for
WHOLE_FILE = "(the whole file)"
VERSION_SECONDS = 60.0
SUMMARY = re.compile(r"^========= (?:ERROR|RACECHECK) SUMMARY: (.*)$", re.MULTILINE)
REPORT = re.compile(r"^========= +(?!COMPUTE-SANITIZER|Host Frame)(\S.*)$", re.MULTILINE)
KEPT_REPORTS = 200  # lines
# Opt-in shared memory of one CTA: CUDA C++ programming guide, table "technical specifications".
DEVICES = {
    "sm_80": Device("A100", 8, 0, 108, 163 << 10, cooperative=True),
    "sm_89": Device("L40S", 8, 9, 142, 99 << 10, cooperative=True),
    "sm_90a": Device("H200", 9, 0, 132, 227 << 10, cooperative=True),
    "sm_100a": Device("B200", 10, 0, 148, 227 << 10, cooperative=True),
    "sm_120a": Device("RTX 5090", 12, 0, 170, 99 << 10, cooperative=True),
}
MODELS = {name: SHAPES[name] for name in ("llama-3.2-1b", "llama-3.1-8b", "qwen3-0.6b")}


def main() -> None:
    """Write the result file; exit 1 if anything failed or was not finished."""
    arguments = parse_arguments()
    if arguments.merge:
        parts = [json.loads(path.read_text()) for path in arguments.merge]
        raise SystemExit(finish(merged(parts), arguments.output))
    if arguments.compile:
        found = {**begin("compiled", arguments.commit), "compiled": run_compiles()}
        save(arguments.output, found)
        raise SystemExit(any(row["spill_bytes"] for row in found["compiled"]))
    device = find_device()
    machine = {"gpu": device.name, "arch": device.arch, "num_sms": device.num_sms}
    found = begin("verification", arguments.commit)
    found |= {"machine": machine, "tests": [], "tools": []}
    ends = time.monotonic() + arguments.limit
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was found so far is written
    try:
        for file in names(arguments.tests):
            run_tests(file, arguments.keyword, ends, found["tests"])
            save(arguments.output, found)
        for tool in run_tools(names(arguments.tools), ends):
            found["tools"].append(tool)
            save(arguments.output, found)
    finally:
        ran = [tool["tool"] for tool in found["tools"]]
        found["left_out"] = [tool for tool in names(arguments.tools) if tool not in ran]
        code = finish(found, arguments.output)
    raise SystemExit(code)


def parse_arguments() -> argparse.Namespace:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tools", default=",".join(TOOLS), help="sanitizers, with commas")
    parser.add_argument("--tests", default=",".join(TESTS), help="test files, with commas")
    parser.add_argument("-k", "--keyword", default="", help="of the tests, as pytest takes it")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds, after which all ends")
    parser.add_argument("--merge", type=Path, nargs="+", help="result files into one, no run")
    parser.add_argument("--compile", action="store_true", help="compile for every architecture")
    parser.add_argument("--commit", help=COMMIT_HELP)
    return parser.parse_args()


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several runs of the same sources on the same kind of GPU; later ones count."""
    for key in ("tree", "kind"):
        values = {part[key] for part in parts}
        if len(values) != 1:
            raise SystemExit(f"the files differ in {key}: {', '.join(sorted(values))}")
    if len(gpus := {part["machine"]["gpu"] for part in parts}) != 1:
        raise SystemExit(f"the files come from different GPUs: {', '.join(sorted(gpus))}")
    tests = {(t["file"], t["name"]): t for part in parts for t in part["tests"]}
    ran = {file for file, name in tests if name != WHOLE_FILE}
    tests = {key: t for key, t in tests.items() if key[1] != WHOLE_FILE or key[0] not in ran}
    tools = {tool["tool"]: tool for part in parts for tool in part["tools"]}
    left_out = {tool for part in parts for tool in part["left_out"]} - set(tools)
    told = ("date", "command", "git", "system", "machine")
    runs = [{key: part[key] for key in told} for part in parts]
    found = {"tests": list(tests.values()), "tools": list(tools.values())}
    return {**parts[-1], **found, "left_out": sorted(left_out), "runs": runs}


def finish(found: dict[str, Any], output: Path) -> int:
    """Write the file, say what is wrong, and the exit code of that."""
    save(output, found)
    bad = [f"{t['name']} ({t['outcome']})" for t in found["tests"] if t["outcome"] in WRONG]
    bad += [tool["tool"] for tool in found["tools"] if not tool["clean"]]
    bad += [f"{tool} (not started)" for tool in found["left_out"]]
    number = f"{len(found['tests'])} tests and {len(found['tools'])} sanitizers"
    print(f"of {number} not content: {', '.join(bad)}" if bad else f"{number} are content")
    return int(bool(bad))


def run_compiles() -> list[dict[str, Any]]:
    """Registers, spills and seconds of the decoder for every architecture and some models."""
    found = []
    for arch, device in DEVICES.items():
        for name, config in MODELS.items():
            spec = ModelSpec.from_hf(config)
            machine = fit_machine(device, spec)
            options = PlanOptions(context=2048, max_batch=machine.max_rows)
            plan = make_plan(spec, machine, options)
            started = time.perf_counter()
            resources = build_cubin(render_cuda(plan), "decode", arch).resources
            seconds = round(time.perf_counter() - started, 1)
            found.append({"arch": arch, "model": name, **asdict(resources), "seconds": seconds})
            print(found[-1], flush=True)
    return found


def names(text: str) -> list[str]:
    """The parts between commas."""
    return [name for name in text.split(",") if name]


def run_tests(file: str, keyword: str, ends: float, tests: list[dict[str, Any]]) -> None:
    """Add name, outcome and seconds of every test of a file, also of those before it was killed."""
    left = ends - time.monotonic()
    if left <= 0:
        tests.append(whole_file(file, UNFINISHED))
        return
    options = ["-m", "gpu", "-n0", "-p", "no:cacheprovider", "-p", "record_tests", "--tb=short"]
    if keyword:
        options += ["-k", keyword]
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "tests.jsonl"
        environment = environ(RECORD_TESTS=str(lines))
        command = [sys.executable, "-m", "pytest", *options, file]
        try:
            ended = subprocess.run(command, cwd=ROOT, check=False, env=environment, timeout=left)
            wrong = ended.returncode not in PYTEST_RAN
        except subprocess.TimeoutExpired:
            wrong = False  # a test that did not finish says so itself
        finally:
            found = read_tests(lines)
            tests += found
        if wrong and all(test["outcome"] not in WRONG for test in found):
            tests.append(whole_file(file, "failed"))


def whole_file(file: str, outcome: str) -> dict[str, Any]:
    """An entry for a file none of whose tests says what went wrong."""
    stem = Path(file.partition("::")[0]).stem
    return {"name": WHOLE_FILE, "file": stem, "outcome": outcome, "seconds": 0.0}


def environ(**more: str) -> dict[str, str]:
    """The environment, with the package and the scripts of this tree."""
    paths = (ROOT / "src", Path(__file__).parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **more}


def run_tools(tools: list[str], ends: float) -> Iterator[dict[str, Any]]:
    """What each sanitizer says; the bits must be those of a run without one."""
    program = [sys.executable, str(ROOT / "benchmarks" / "sanitized_run.py")]
    expected = run(program, ends).stdout.strip() if tools else ""
    for tool in tools:
        if time.monotonic() >= ends:
            return
        started = time.perf_counter()
        watched = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *program]
        watched += ["--every-lane-arrives"] * (tool == "racecheck")
        ended = run(watched, ends)
        text = ended.stdout + ended.stderr
        summary = SUMMARY.findall(text)
        equal = bool(expected) and expected in text
        reports = REPORT.findall(text)[:KEPT_REPORTS]
        found = {
            "tool": tool,
            "version": version(),
            "clean": ended.returncode == 0 and equal and bool(summary),
            "summary": summary[-1] if summary else text[-500:],
            "equal_bits": equal,
            "reports": [] if ended.returncode == 0 else reports,
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(json.dumps(found, indent=1), flush=True)
        yield found


def run(command: list[str], ends: float) -> subprocess.CompletedProcess[str]:
    """A program with this tree's package, its output caught; what it cannot do is its output."""
    left = max(0.1, ends - time.monotonic())
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=environ(), timeout=left
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")
    except subprocess.TimeoutExpired as late:
        said = (late.stderr or b"").decode(errors="replace")
        said += "did not end within the time limit"
        return subprocess.CompletedProcess(command, 124, "", said)


def version() -> str:
    """Of compute-sanitizer, where it is installed."""
    ended = run(["compute-sanitizer", "--version"], time.monotonic() + VERSION_SECONDS)
    return (ended.stdout.strip() or ended.stderr).splitlines()[-1]


if __name__ == "__main__":
    main()
