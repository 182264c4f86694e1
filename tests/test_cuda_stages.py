"""Every stage of the CUDA kernel alone, against float64, for shapes that divide by nothing.

The kernel is stopped after each matrix in turn and its exchange is read (`stop_after`).
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from flashformer.backends.cuda.compile import compile_kernel
from flashformer.backends.cuda.machine import row_classes
from flashformer.model.spec import RopeSpec
from flashformer.plan.plan import PlanOptions, make_plan
from specs import SpecWeights, layer_spec, model_spec, packed
from stage_oracle import Watched

pytestmark = pytest.mark.gpu

CONTEXT = 160
SLOTS = 3


def attention(heads, kv_heads, head_dim, **changes):
    rope = RopeSpec("default", 10000.0, changes.pop("rotary_dim", head_dim), CONTEXT)
    fields = {"num_q_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    layer = {**fields, "attention_scale": head_dim**-0.5, **changes}
    return layer, rope


# name -> (attention, hidden_size, intermediate_size, vocab_size, format of the body and the head)
SHAPES = {
    "head 64, groups of 4": (attention(8, 2, 64), 520, 1111, 1003, "bf16"),
    "head 80, biases": (
        attention(6, 2, 80, qkv_bias=True, o_bias=True, mlp_bias=True), 333, 701, 517, "bf16",
    ),
    "head 96, part rotated, window": (
        attention(5, 5, 96, rotary_dim=72, window=37), 1001, 450, 777, "bf16",
    ),
    "head 128, QK-norm, groups of 7": (
        attention(14, 2, 128, qk_norm=True), 899, 2739, 1501, "bf16",
    ),
    "down in two parts, biases": (
        attention(6, 2, 80, qkv_bias=True, o_bias=True, mlp_bias=True), 333, 4501, 517, "bf16",
    ),
    "head 256, groups of 16": (attention(16, 1, 256), 257, 600, 300, "bf16"),
    "head 24, odd everything": (attention(3, 3, 24), 77, 91, 101, "bf16"),
    "fp16, head 64, window": (attention(9, 3, 64, window=70), 577, 999, 1009, "f16"),
    "int8": (attention(8, 2, 64), 520, 1111, 1003, "int8"),
    "int8 in windows": (attention(4, 1, 128), 1024, 14336, 1000, "int8"),
    "fp8": (attention(6, 2, 80, o_bias=True, mlp_bias=True), 333, 701, 517, "fp8"),
    "fp8 in windows": (attention(4, 1, 128), 1024, 14336, 1000, "fp8"),
    "int4, groups of 128, int8 head": (attention(8, 2, 64), 1537, 1111, 1003, "int4g128 int8"),
    "int4 in windows": (attention(4, 1, 128), 1024, 14336, 1000, "int4g128 int8"),
    "int4, groups of 64": (attention(5, 5, 96, window=37), 1001, 450, 777, "int4g64"),
    "int4, groups of 32": (attention(14, 2, 128, qk_norm=True), 899, 2739, 1501, "int4"),
    "int4 with zero-points": (attention(8, 2, 64), 520, 1111, 1003, "int4g128z"),
    "int4, groups of 64 with zero-points": (attention(3, 3, 24), 77, 91, 101, "int4g64z"),
    "int4, groups of 32 with zero-points": (attention(9, 3, 64), 577, 999, 1009, "int4z"),
}  # fmt: skip


def plan_of(name):
    from flashformer.backends.cuda import cuda_machine

    (layer, rope), hidden, inner, vocab, weight_format = SHAPES[name]
    layers = tuple(layer_spec(**layer, intermediate_size=inner) for _ in range(2))
    spec = model_spec(layers, hidden_size=hidden, vocab_size=vocab, ropes=(rope,),
                      max_position_embeddings=CONTEXT)  # fmt: skip
    formats = (weight_format.split() * 2)[:2]
    return make_plan(spec, cuda_machine(spec), PlanOptions(*formats, CONTEXT, SLOTS))


@pytest.fixture(scope="module", autouse=True)
def compiled(request):
    """The kernels of all tests to come, side by side: compiling takes longer than running."""
    tests = [item for item in request.session.items if item.module is request.module]
    plans = [plan_of(test.callspec.params["name"]) for test in tests]
    jobs = [(plan, rows) for plan in plans for rows in row_classes(plan.machine)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: compile_kernel(job[0], rows=job[1], apart=True), jobs))


def watch(name):
    from flashformer.backends.cuda import CudaBackend

    plan = plan_of(name)
    image = packed(plan, SpecWeights(plan.spec, seed=7))
    pages = -(-CONTEXT // plan.machine.page_tokens)
    table = np.arange(SLOTS * pages, dtype=np.int32)[::-1].reshape(SLOTS, pages)
    return Watched(CudaBackend(plan, image, SLOTS * pages), image, table)


@pytest.mark.parametrize("name", SHAPES)
def test_every_stage_is_within_the_bound_of_its_arithmetic(name):
    watched = watch(name)
    rng = np.random.default_rng(3)

    def ids(count):
        return rng.integers(0, watched.plan.spec.vocab_size, count)

    # A prompt over two pages in chunks of eight, another of five tokens, then all in one batch.
    for first in range(0, 72, 8):
        checked = watched.step(ids(8), list(range(first, first + 8)), [0] * 8)
    watched.step(ids(5), list(range(5)), [1] * 5)
    watched.step(ids(3), [72, 5, 0], [0, 1, 2])
    watched.step(ids(6), [73, 6, 7, 8, 9, 1], [0, 1, 1, 1, 1, 2])
    watched.backend.close()

    assert len(checked) == 5 * watched.plan.spec.num_layers + 1
