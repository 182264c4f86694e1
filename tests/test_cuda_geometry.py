"""Python's numbers for the proof are those of the kernel: its own headers are asked, by NVRTC."""

import shutil
from itertools import pairwise

import pytest

from flashformer.backends.cuda import compile as cuda_compile
from flashformer.backends.cuda.geometry import page_bytes, past_of, stage_shape
from flashformer.codegen.cuda_header import MATRICES, render_cuda
from flashformer.errors import CompileError
from test_cuda_compile import plan_for

FIELDS = (
    "runs", "last_blocks", "tile_bytes", "num_chunks", "chunk_runs", "last_runs", "window_chunks",
    "group", "num_windows",
)  # fmt: skip
# Of the body and the head: every kind of run.
FORMATS = (
    ("bf16", "bf16"), ("int8", "fp8"), ("int4g128", "int8"), ("int4z", "int4"), ("fp8", "int4g64z"),
)  # fmt: skip


@pytest.fixture
def accepted(tmp_path, monkeypatch):
    """Whether static assertions hold in the kernel's headers for a plan."""
    folder = tmp_path / "kernel"
    shutil.copytree(cuda_compile.KERNEL, folder)
    monkeypatch.setattr(cuda_compile, "KERNEL", folder)

    def check(plan, rows, assertions):
        lines = [f"static_assert({text});" for text in assertions]
        source = ['#include "past.cuh"', *lines, 'extern "C" __global__ void none() {}']
        (folder / "asked.cu").write_text("\n".join(source))
        try:
            cuda_compile.build_cubin(render_cuda(plan, rows=rows), "asked", plan.machine.arch)
        except CompileError as error:
            if "static assertion" not in str(error):
                raise
            return False
        return True

    return check


def stages_of(plan, rows):
    """C++ assertions of every number of every matrix."""
    for name in (*MATRICES, "lm_head"):
        matrix = plan.matrix(name, -1 if name == "lm_head" else 0)
        shape = stage_shape(plan, matrix, rows)
        runs = shape.runs if shape.whole else shape.window_chunks * shape.chunk_runs
        copies = 1 if shape.whole else 2
        stride = f"Rows<Stage<Kind::{name}>::F, {runs}>::stride"
        yield f"{copies * rows} * {stride} == {shape.x_bytes(rows)}"
        yield f"Stage<Kind::{name}>::tiles == {matrix.num_tiles}"
        yield f"Stage<Kind::{name}>::in_two == {str(shape.whole and shape.num_windows > 1).lower()}"
        for field in FIELDS:
            yield f"Stage<Kind::{name}>::{field} == {getattr(shape, field)}"


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("shape", ["llama-3.1-8b", "llama-3.3-70b", "odd"])
@pytest.mark.parametrize("formats", FORMATS, ids=" and ".join)
def test_python_cuts_matrices_and_pages_as_the_kernel_does(accepted, formats, shape, rows):
    plan = plan_for("sm_90a", shape, *formats)
    layer = plan.spec.layers[0]
    least = past_of(plan, layer, 1, 1).chunk_pages  # of a short past: the smallest chunk
    pages = [f"page_bytes == {page_bytes(plan, layer)}", f"min_chunk_pages == {least}"]

    assert accepted(plan, rows, [*stages_of(plan, rows), *pages])


@pytest.mark.parametrize("shape", ["llama-3.2-1b", "qwen3-0.6b", "odd"])
def test_python_stores_tiles_as_the_kernel_reads_them(accepted, shape):
    plan = plan_for("sm_90a", shape)
    gate_up = plan.matrix("gate_up", 0)
    stored = [gate_up.stored_tiles[a:b].tolist() for a, b in pairwise(gate_up.first_tile)]
    assert sorted(t for tiles in stored for t in tiles) == list(range(gate_up.num_tiles))

    assertions = [
        f"Stage<Kind::gate_up>::tile({cta}, {i}) == {tile}"
        for cta, tiles in enumerate(stored)
        for i, tile in enumerate(tiles)
    ]
    assert accepted(plan, 1, assertions)


@pytest.mark.parametrize(
    ("shape", "formats", "chunks", "early"),
    [
        ("llama-3.1-8b", ("bf16", "bf16"), 28, 24),
        ("llama-3.1-8b", ("int4g128", "int8"), 7, 6),
        ("llama-3.2-1b", ("bf16", "bf16"), 16, 12),
        ("qwen3-0.6b", ("bf16", "bf16"), 6, 6),
    ],
)
def test_down_begins_with_what_all_but_the_last_tiles_of_gate_up_have_sent(
    shape, formats, chunks, early
):
    plan = plan_for("sm_90a", shape, *formats)
    found = stage_shape(plan, plan.matrix("down", 0), 1)
    assert (found.num_chunks, found.window_chunks) == (chunks, early)


def test_a_number_that_differs_is_noticed(accepted):
    plan = plan_for("sm_90a", "odd")
    assert not accepted(plan, 8, ["Stage<Kind::down>::num_chunks == 77"])
