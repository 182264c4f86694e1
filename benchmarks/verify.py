"""Runs the tests of the CUDA kernel and the sanitizers on a GPU, and writes one result file.

python benchmarks/verify.py -o benchmarks/results/verification/NAME.json
python benchmarks/verify.py --compile -o ...: what the assembler says, without a GPU
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashformer.backends.cuda.compile import build_cubin
from flashformer.backends.cuda.machine import Device, find_device, fit_machine
from flashformer.codegen.cuda_header import render_cuda
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.plan.plan import PlanOptions, make_plan
from flashformer.serve.benchmark.provenance import provenance, system

ROOT = Path(__file__).parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TESTS = (
    *("tests/test_cuda_stages.py", "tests/test_cuda_safety.py", "tests/test_cuda.py"),
    *("tests/test_prefill_ops.py", "tests/test_cuda_prefill.py"),
)
SUMMARY = re.compile(r"^========= (?:ERROR|RACECHECK) SUMMARY: (.*)$", re.MULTILINE)
REPORT = re.compile(r"^========= (?!COMPUTE-SANITIZER)(\S.*)$", re.MULTILINE)
KEPT_REPORTS = 20
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
    """Write the result file; exit 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tools", default=",".join(TOOLS), help="sanitizers, with commas")
    parser.add_argument("--tests", default=",".join(TESTS), help="test files, with commas")
    parser.add_argument("--compile", action="store_true", help="compile for every architecture")
    arguments = parser.parse_args()
    if arguments.compile:
        found = {**provenance(), "compiled": run_compiles()}
        write(arguments.output, {"schema": 1, "kind": "compiled", **found})
        raise SystemExit(any(row["spill_bytes"] for row in found["compiled"]))
    tests = run_tests(names(arguments.tests))
    tools = run_tools(names(arguments.tools))
    write(arguments.output, document(tests, tools))
    failed = [t["name"] for t in tests if t["outcome"] == "failed"]
    failed += [t["tool"] for t in tools if not t["clean"]]
    clean = f"{len(tests)} tests and {len(tools)} sanitizers are content"
    print(f"failed: {', '.join(failed)}" if failed else clean)
    raise SystemExit(bool(failed))


def write(path: Path, value: dict[str, Any]) -> None:
    """One result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def run_compiles() -> list[dict[str, Any]]:
    """Registers, spills and seconds of the decoder for every architecture and some models."""
    found = []
    for arch, device in DEVICES.items():
        for name, config in MODELS.items():
            spec = ModelSpec.from_hf(config)
            plan = make_plan(spec, fit_machine(device, spec), PlanOptions(context=2048))
            started = time.perf_counter()
            resources = build_cubin(render_cuda(plan), "decode", arch).resources
            seconds = round(time.perf_counter() - started, 1)
            found.append({"arch": arch, "model": name, **asdict(resources), "seconds": seconds})
            print(found[-1], flush=True)
    return found


def names(text: str) -> list[str]:
    """The parts between commas."""
    return [name for name in text.split(",") if name]


def document(tests: list[dict[str, Any]], tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The result file."""
    device = find_device()
    found = provenance()
    found["versions"] |= {
        name: importlib.metadata.version(name) for name in ("cuda-bindings", "torch")
    }
    machine = {"gpu": device.name, "arch": device.arch, "num_sms": device.num_sms, **system()}
    return {
        "schema": 1,
        "kind": "verification",
        **found,
        "machine": machine,
        "tests": tests,
        "tools": tools,
    }


def run_tests(files: list[str]) -> list[dict[str, Any]]:
    """Name, outcome and seconds of every test."""
    if not files:
        return []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = [
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            "--tb=short",
            f"--junitxml={report}",
        ]
        subprocess.run([sys.executable, "-m", "pytest", *options, *files], cwd=ROOT, check=False)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return [
            {
                "name": case.attrib["name"],
                "file": case.attrib["classname"].split(".")[-1],
                "outcome": outcome(case),
                "seconds": round(float(case.attrib["time"]), 2),
            }
            for case in cases
        ]


def outcome(case: ElementTree.Element) -> str:
    """passed, failed or skipped."""
    kinds = {child.tag for child in case}
    return (
        "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
    )


def run_tools(tools: list[str]) -> list[dict[str, Any]]:
    """What each sanitizer says; the bits must be those of a run without one."""
    if not tools:
        return []
    program = [sys.executable, str(ROOT / "benchmarks" / "sanitized_run.py")]
    expected = run(program).stdout.strip()
    found = []
    for tool in tools:
        started = time.perf_counter()
        ended = run(["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *program])
        text = ended.stdout + ended.stderr
        summary = SUMMARY.findall(text)
        equal = bool(expected) and expected in text
        reports = REPORT.findall(text)[:KEPT_REPORTS]
        found.append(
            {
                "tool": tool,
                "version": version(),
                "clean": ended.returncode == 0 and equal and bool(summary),
                "summary": summary[-1] if summary else text[-500:],
                "equal_bits": equal,
                "reports": [] if ended.returncode == 0 else reports,
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
        print(json.dumps(found[-1], indent=1), flush=True)
    return found


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A program with this tree's package, its output caught."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def version() -> str:
    """Of compute-sanitizer."""
    return run(["compute-sanitizer", "--version"]).stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    main()
