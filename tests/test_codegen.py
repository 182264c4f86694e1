"""The header says what the plan says, and the kernel compiles with it for every machine."""

import ctypes
import re
import shutil
import subprocess

import pytest

from flashformer.backends.cpu.compile import FLAGS, KERNEL, find_compiler
from flashformer.backends.cpu.machine import cpu_machine
from flashformer.codegen.header import kv_page_elements, render
from flashformer.codegen.step_args import STEP_ARGS, StepArgs
from flashformer.errors import CompileError
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.plan.plan import PlanOptions, make_plan
from specs import layer_spec, model_spec, plan_of

# Instruction set -> compiler flag, formats of layers and head: not each with each, for speed.
ARCHES = {
    "avx2": ("-march=x86-64-v3", "int4", "bf16"),
    "avx512": ("-march=skylake-avx512", "int8", "f16"),
    "avx512vnni": ("-march=icelake-server", "int4", "bf16"),
    "scalar": ("-DFLASHFORMER_SCALAR", "int4g128", "f32"),
}


def render_shape(shape, weight_format="int4", head_format="int8"):
    spec = ModelSpec.from_hf(SHAPES[shape])
    options = PlanOptions(weight_format, head_format, context=2048)
    return render(make_plan(spec, cpu_machine(2), options))


def compile_with(command, header, folder, source=KERNEL / "decode.cpp"):
    (folder / "config.h").write_text(header)
    return subprocess.run(
        [*command, f"-I{folder}", str(source)], capture_output=True, text=True, check=False
    )


def test_the_same_plan_renders_the_same_bytes():
    assert render_shape("llama-3.2-1b") == render_shape("llama-3.2-1b")


def test_the_header_holds_data_and_no_statements():
    code = re.sub(r"//.*", "", render_shape("smollm3-3b"))
    assert not re.search(r"\b(if|for|while|return|template|auto)\b|#(?!pragma once)|\w\(", code)


def test_constants_and_offsets_are_those_of_the_plan():
    plan = plan_of(model_spec(layers=(layer_spec(qkv_bias=True), layer_spec(window=7))))
    header = render(plan)
    for name in ("hidden_size", "vocab_size", "num_layers"):
        assert f"constexpr int {name} = {getattr(plan.spec, name)};" in header
    rows = header.split("layers[] = {", 1)[1].splitlines()[1:3]
    for index, row in enumerate(rows):
        numbers = [int(n) for n in re.findall(r"(?<![\w.])-?\d+(?![\w.])", row)]
        for name in ("qkv", "o_proj", "gate_up", "down"):
            matrix = plan.matrix(name, index)
            assert matrix.offset in numbers
            assert matrix.num_tiles in numbers
        assert plan.vector("input_layernorm", index).offset in numbers
    assert plan.vector("qkv_bias", 0).offset in [int(n) for n in re.findall(r"\d+", rows[0])]
    assert kv_page_elements(plan) == 2 * sum(x.kv_rows for x in plan.spec.layers) * 8


def test_step_args_have_one_layout_in_both_languages(tmp_path):
    places = {f.name: getattr(StepArgs, f.name).offset for f in STEP_ARGS}
    checks = [f"static_assert(offsetof(StepArgs, {n}) == {o});" for n, o in places.items()]
    checks.append(f"static_assert(sizeof(StepArgs) == {ctypes.sizeof(StepArgs)});")
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(["#include <cstddef>", "#include <config.h>", *checks]))
    command = [find_compiler().path, "-std=c++20", "-fsyntax-only"]
    done = compile_with(command, render_shape("llama-3.2-1b"), tmp_path, source)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arch", ARCHES)
def test_the_kernel_compiles_without_warnings_for_every_instruction_set(arch, tmp_path):
    compiler = find_compiler().path
    flag, *formats = ARCHES[arch]
    probe = [compiler, flag, "-E", "-x", "c++", "/dev/null"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{compiler} does not know {flag}")
    command = [compiler, *FLAGS, "-fsyntax-only", "-Wall", "-Wextra", "-Werror", flag]
    done = compile_with(command, render_shape("qwen3-0.6b", *formats), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_kernel_compiles_for_neon(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("there is no AArch64 compiler (Debian, Ubuntu: g++-aarch64-linux-gnu)")
    command = [compiler, *FLAGS, "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    done = compile_with(command, render_shape("qwen3-0.6b"), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_compiler_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setenv("FLASHFORMER_CXX", "no-such-compiler")
    with pytest.raises(CompileError, match=r"FLASHFORMER_CXX names .*no-such-compiler"):
        find_compiler()
    monkeypatch.delenv("FLASHFORMER_CXX")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CompileError, match=r"There is no C\+\+ compiler.*apt install"):
        find_compiler()
