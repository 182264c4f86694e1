"""The CUDA kernel compiles for every architecture, without a GPU and without spilled registers."""

import itertools
import sys
import time
from dataclasses import replace
from threading import Lock

import pytest

from flashformer.backends.cuda import compile as cuda_compile
from flashformer.backends.cuda.compile import Cubin, Resources, build_cubin
from flashformer.backends.cuda.geometry import activation_bytes
from flashformer.backends.cuda.machine import MIN_SLOTS, Device, fit_machine, text_before_zero
from flashformer.codegen.cuda_header import render_cuda, slot_bytes
from flashformer.codegen.exchange import residual_travels
from flashformer.errors import CompileError, UnsupportedModelError, UsageError
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.plan.plan import Plan, PlanOptions, make_plan

# Opt-in shared memory of one CTA: CUDA C++ programming guide, table "technical specifications".
DEVICES = {
    "sm_80": Device("A100", 8, 0, 108, 163 << 10, cooperative=True),
    "sm_89": Device("L40S", 8, 9, 142, 99 << 10, cooperative=True),
    "sm_90a": Device("H200", 9, 0, 132, 227 << 10, cooperative=True),
    "sm_100a": Device("B200", 10, 0, 148, 227 << 10, cooperative=True),
    "sm_120a": Device("RTX 5090", 12, 0, 170, 99 << 10, cooperative=True),
}


# Divides by nothing: heads of 80 channels in groups of 5, QK-norm, odd widths.
ODD = {
    **SHAPES["qwen3-0.6b"],
    "hidden_size": 1111,
    "intermediate_size": 2739,
    "num_attention_heads": 15,
    "num_key_value_heads": 3,
    "head_dim": 80,
    "vocab_size": 50_257,
}


def plan_for(arch: str, shape: str, body: str = "bf16", head: str = "bf16") -> Plan:
    spec = ModelSpec.from_hf(ODD if shape == "odd" else SHAPES[shape])
    machine = fit_machine(DEVICES[arch], spec)
    return make_plan(spec, machine, PlanOptions(body, head, 2048, machine.max_rows))


def least_shared_bytes(plan: Plan, resources: Resources) -> int:
    ring = MIN_SLOTS * slot_bytes(plan)
    return resources.shared_bytes + activation_bytes(plan, plan.machine.max_rows) + ring


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "llama-3.2-1b", "odd"])
@pytest.mark.parametrize("arch", DEVICES)
def test_the_kernel_compiles_for_every_architecture_without_spills(arch, shape, record_property):
    plan = plan_for(arch, shape)
    assert plan.machine.arch == arch

    resources = build_cubin(render_cuda(plan), "decode", arch).resources

    record_property("registers", resources.registers)
    assert resources.spill_bytes == 0
    assert 0 < resources.registers <= 168  # ten warps share 65536 registers, three on one scheduler
    assert least_shared_bytes(plan, resources) <= plan.machine.shared_bytes


# Body and head; between them every kind of weight, on the oldest and on the newest instructions.
NARROW = [
    ("sm_80", "llama-3.1-8b", "int4g128z", "int8"),
    ("sm_89", "odd", "int8", "fp8"),
    ("sm_90a", "llama-3.1-8b", "int4g128", "int8"),
    ("sm_90a", "llama-3.1-8b", "fp8", "int4"),
    ("sm_100a", "odd", "int4g64z", "int4"),
    ("sm_120a", "llama-3.2-1b", "fp8", "int8"),
    ("sm_90a", "llama-3.3-70b", "int4g128", "int8"),
]


@pytest.mark.parametrize(("arch", "shape", "body", "head"), NARROW)
def test_narrow_weights_compile_for_every_architecture_without_spills(arch, shape, body, head):
    plan = plan_for(arch, shape, body, head)
    for rows in (1, plan.machine.max_rows):
        resources = build_cubin(render_cuda(plan, rows=rows), "decode", arch).resources
        assert resources.spill_bytes == 0, rows
        assert resources.registers <= 168
    assert least_shared_bytes(plan, resources) <= plan.machine.shared_bytes


@pytest.mark.parametrize(
    ("arch", "shape", "rows", "slot", "window"),
    [
        ("sm_90a", "llama-3.1-8b", 8, 16384, 32768),
        ("sm_90a", "llama-3.3-70b", 8, 16384, 32768),
        ("sm_120a", "llama-3.2-1b", 8, 11264, 16384),
        ("sm_120a", "llama-3.1-8b", 4, 13312, 16384),
    ],
)
def test_shared_memory_holds_as_many_rows_as_leave_the_ring_its_slots(
    arch, shape, rows, slot, window
):
    machine = plan_for(arch, shape).machine
    assert (machine.max_rows, machine.slot_bytes, machine.window_bytes) == (rows, slot, window)


def test_a_row_that_leaves_no_ring_is_refused_with_the_numbers():
    spec = ModelSpec.from_hf({**SHAPES["llama-3.1-8b"], "hidden_size": 65536})
    with pytest.raises(UnsupportedModelError, match=r"101376 bytes.*hidden_size 65536 needs \d+"):
        fit_machine(DEVICES["sm_120a"], spec)


def test_two_kinds_of_16_bit_floats_in_one_model_are_refused():
    with pytest.raises(UnsupportedModelError, match="f16 in the layers and fp8 in the head"):
        render_cuda(plan_for("sm_90a", "llama-3.2-1b", "f16", "fp8"))


@pytest.mark.parametrize("shape", ["qwen3-0.6b", "qwen2.5-7b", "phi-4-mini", "smollm3-3b"])
def test_the_kernel_compiles_for_the_features_of_other_families(shape):
    plan = plan_for("sm_90a", shape)

    assert build_cubin(render_cuda(plan), "decode", "sm_90a").resources.spill_bytes == 0


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "qwen3-8b", "qwen2.5-7b"])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_kernels_of_fewer_rows_compile_without_spills(shape, rows):
    header = render_cuda(plan_for("sm_90a", shape), rows=rows)

    assert build_cubin(header, "decode", "sm_90a").resources.spill_bytes == 0


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("shape", ["llama-3.1-8b", "qwen3-0.6b"])
def test_the_kernels_of_prompts_compile_for_every_architecture(arch, shape):
    resources = build_cubin(render_cuda(plan_for(arch, shape)), "prefill", arch).resources

    assert resources.spill_bytes == 0
    assert resources.registers <= 64  # four CTAs of 256 threads an SM hide the memory's latency


def test_the_stream_kernel_compiles():
    plan = plan_for("sm_90a", "llama-3.2-1b")

    assert build_cubin(render_cuda(plan), "stream", "sm_90a").resources.spill_bytes == 0


@pytest.mark.parametrize("python", [sys.executable, "/no/such/python"])
def test_a_process_of_its_own_compiles_the_same(python, monkeypatch):
    header = render_cuda(plan_for("sm_90a", "llama-3.2-1b"))
    here = build_cubin(header, "stream", "sm_90a")
    monkeypatch.setattr(sys, "executable", python)

    assert build_cubin(header, "stream", "sm_90a", apart=True) == here


def test_what_nvrtc_refuses_is_said_from_a_process_of_its_own_too():
    with pytest.raises(CompileError, match=r"(?s)refused the CUDA kernel for sm_90a.*not_a_number"):
        build_cubin("not_a_number x;", "stream", "sm_90a", apart=True)


def test_a_gpu_s_name_ends_at_its_zero_whatever_the_driver_leaves_behind_it():
    assert text_before_zero(b"NVIDIA H100 80GB HBM3\0\0\0      ") == "NVIDIA H100 80GB HBM3"
    assert text_before_zero(b"NVIDIA H200") == "NVIDIA H200"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_cta_has_a_tile_of_what_all_others_wait_for(shape):
    plan = plan_for("sm_90a", shape)
    for name in ("gate_up", "lm_head"):
        split = plan.matrix(name, 0 if name == "gate_up" else -1).first_tile
        assert all(a < b for a, b in itertools.pairwise(split)), name


@pytest.mark.parametrize(
    ("shape", "travels"), [("llama-3.2-1b", False), ("qwen3-0.6b", True), ("smollm2-135m", True)]
)
def test_few_rows_of_the_hidden_state_lie_on_different_ctas_in_o_proj_and_down(shape, travels):
    plan = plan_for("sm_90a", shape)
    splits = [plan.matrix(name, 0).first_tile for name in ("o_proj", "down")]
    owners = [{i for i, (a, b) in enumerate(itertools.pairwise(s)) if a < b} for s in splits]

    assert residual_travels(plan) == travels == owners[0].isdisjoint(owners[1])
    assert plan.machine.num_ctas > 120


def test_an_old_gpu_is_refused_in_one_sentence():
    spec = ModelSpec.from_hf(SHAPES["llama-3.2-1b"])
    old = Device("GTX 1080", 6, 1, 20, 48 << 10, cooperative=True)

    with pytest.raises(UsageError, match=r"compute capability 6\.1"):
        fit_machine(old, spec)


def test_a_head_dim_that_is_no_whole_number_of_packets_is_refused():
    spec = ModelSpec.from_hf({**SHAPES["llama-3.2-1b"], "head_dim": 60})

    with pytest.raises(UnsupportedModelError, match="head_dim 60"):
        fit_machine(DEVICES["sm_90a"], spec)


def test_rotary_embeddings_of_no_whole_number_of_pairs_of_pairs_are_refused():
    spec = ModelSpec.from_hf(SHAPES["llama-3.2-1b"])
    ropes = tuple(replace(rope, rotary_dim=30) for rope in spec.ropes)

    with pytest.raises(UnsupportedModelError, match=r"30 dims.*multiple of 4"):
        fit_machine(DEVICES["sm_90a"], replace(spec, ropes=ropes))


def test_kernels_that_are_compiled_ahead_are_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHFORMER_CACHE_DIR", str(tmp_path))
    plan = plan_for("sm_90a", "llama-3.2-1b")
    plan = replace(plan, machine=replace(plan.machine, max_rows=2))
    built, lock = [], Lock()

    def build(header, name, *_, **__):
        with lock:
            built.append((name, "max_rows = 1;" in header))
        time.sleep(0.2)
        return Cubin(b"code", Resources(1, 0, 1))

    monkeypatch.setattr(cuda_compile, "build_cubin", build)
    cuda_compile.compile_ahead(plan)
    while len(built) < 3:
        time.sleep(0.01)
    for name, rows in (("decode", 1), ("decode", 2), ("prefill", None)):
        assert cuda_compile.compile_kernel(plan, name, rows=rows).code == b"code"

    assert sorted(built) == [("decode", False), ("decode", True), ("prefill", False)]


def test_whoever_asks_for_a_kernel_that_cannot_be_compiled_hears_it(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHFORMER_CACHE_DIR", str(tmp_path))
    plan = plan_for("sm_90a", "llama-3.2-1b")

    def fail(*_, **__):
        raise CompileError("no compiler today")

    monkeypatch.setattr(cuda_compile, "build_cubin", fail)
    cuda_compile.compile_ahead(plan)
    with pytest.raises(CompileError, match="no compiler today"):
        cuda_compile.compile_kernel(plan, rows=1)
