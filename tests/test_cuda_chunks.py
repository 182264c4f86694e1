"""The chunks of the CUDA kernel's attention, run by a CPU, are merged as numpy merges them."""

import ctypes

import numpy as np
import pytest

from flashformer.backends.cuda.geometry import merges_of, past_of, units_of
from flashformer.codegen.cuda_args import CudaStepArgs
from flashformer.codegen.exchange import (
    exchange_bytes,
    find_buffer,
    max_chunks,
    padded,
    read_buffer,
)
from simt_library import simt_library
from specs import layer_spec
from test_cuda_program import small_plan

CTAS = 3
# name -> (q heads, kv heads, head_dim, window of the second layer)
SHAPES = {
    "head 128, a window of two chunks": (2, 1, 128, 300),
    "head 24, groups of 3": (3, 1, 24, 0),
    "head 256": (2, 1, 256, 0),
    "head 80, a window of one chunk": (6, 2, 80, 50),
}


@pytest.mark.parametrize("name", SHAPES)
def test_chunks_are_merged_as_numpy_merges_them(tmp_path, name):
    q_heads, kv_heads, head_dim, window = SHAPES[name]
    fields = {"num_q_heads": q_heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    layers = tuple(layer_spec(**fields, window=w, intermediate_size=99) for w in (0, window))
    plan = small_plan(CTAS, layers, hidden_size=200)
    positions = [1200, 3, 700]
    rng = np.random.default_rng(0)
    shape = (len(positions), q_heads, max_chunks(plan, layers[0]), 2 + padded(head_dim))
    partials = rng.standard_normal(shape).astype(np.float32)
    partials[..., 1] = rng.uniform(1, 99, shape[:-1])

    merged = merge(simt_library(tmp_path, plan, "chunks"), plan, positions, partials)

    assert any(past_of(plan, layers[0], p, p).num_chunks > 1 for p in positions)
    for row, position in enumerate(positions):
        counts = [past_of(plan, layer, position, position).num_chunks for layer in layers]
        if max(counts) == 1:
            continue
        last = max(i for i, count in enumerate(counts) if count > 1)  # that wrote the row
        parts = partials[row, :, : counts[last]].astype(np.float64)
        weight = np.exp2(parts[..., :1] - parts[..., :1].max(1, keepdims=True))
        values = parts[..., 2 : 2 + head_dim] + last
        expected = (weight * values).sum(1) / (weight * parts[..., 1:2]).sum(1)
        # bf16 rounds by half a unit of 2^-7 at most, a tag moves a value by one
        bound = 1.5 * 2.0**-7 * np.abs(expected) + 1e-6
        assert (np.abs(merged[row].reshape(q_heads, head_dim) - expected) <= bound).all()


def merge(library, plan, positions, partials):
    """What every row's heads are after two layers: float64 [rows, q_rows]."""
    buffer = np.full(exchange_bytes(plan)[1], 255, np.uint8)
    barrier, abandon = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    args = CudaStepArgs()
    args.num_rows, args.epoch = len(positions), 7
    args.wait_limit_ns = 2**63
    args.exchange, args.barrier = buffer.ctypes.data, barrier.ctypes.data
    args.abandon = abandon.ctypes.data
    for row, position in enumerate(positions):
        args.positions[row] = args.bases[row] = position
    library.merge(ctypes.byref(args), partials.ctypes.data_as(ctypes.c_void_p))
    at, part = find_buffer(plan, "attention")
    width = plan.spec.layers[0].q_rows
    return read_buffer(plan, part, buffer[at:])[:, :width].astype(np.float64)


def test_every_head_of_several_chunks_is_merged_once():
    plan = small_plan(CTAS, (layer_spec(num_q_heads=6, num_kv_heads=2, head_dim=16),))
    layer, positions = plan.spec.layers[0], [1200, 3, 700]
    merges = [merge for cta in merges_of(plan, layer, positions) for merge in cta]
    units = [unit for cta in units_of(plan, layer, positions) for unit in cta]
    rows = {unit.row for unit in units if unit.past.num_chunks > 1}

    assert rows == {0, 2}
    assert sorted((m.row, m.head) for m in merges) == [(r, h) for r in (0, 2) for h in range(6)]
