"""The kernels between a prompt's products compute what their definitions in torch do.

On a GPU, and on the CPU through a stand-in for CUDA.
"""

from dataclasses import replace

import pytest
import torch

from checkpoints import make_checkpoint
from emulated_kernels import emulated_ops
from flashformer.backends.cuda.compile import compile_kernel
from flashformer.backends.cuda.kv_pages import Pages
from flashformer.backends.cuda.machine import cuda_machine
from flashformer.backends.cuda.prefill_kernels import KernelOps
from flashformer.backends.cuda.prefill_ops import Heads, TorchOps, Update, rotations
from flashformer.backends.cuda.unpack import padded_cols
from test_cuda import head_dim
from test_prefill import cuda_plan, image_of

ROWS = 37
VARIANTS = ("llama-bias", "qwen3", "llama-f16", "mistral")
CASES = [("cpu", v) for v in VARIANTS]
CASES += [pytest.param(("cuda", v), marks=pytest.mark.gpu) for v in VARIANTS]


def plan_for(folder, variant):
    wider = {} if head_dim(variant) % 8 == 0 else {"head_dim": 24}
    made = make_checkpoint(folder / "model", variant, **wider)
    return cuda_plan(lambda _: made, variant)


class Case:
    """A model's plan and image, and both ways to compute."""

    def __init__(self, folder, device, variant):
        plan, weights = plan_for(folder, variant)
        if device == "cuda":
            machine = cuda_machine(plan.spec)
            plan = replace(plan, machine=replace(plan.machine, arch=machine.arch))
        self.device, self.plan = device, plan
        self.image = torch.from_numpy(image_of(plan, weights)).to(device)
        self.layer = plan.spec.layers[0]
        self.kernels = KernelOps(plan) if device == "cuda" else emulated_ops(plan, folder)
        self.plain = TorchOps(self.layer.head_dim, plan.spec.rms_norm_eps)
        self.half = torch.float16 if plan.options.format == "f16" else torch.bfloat16
        self.vectors = {
            v.name: self.image[v.offset : v.offset + 4 * v.length].view(torch.float32)
            for v in plan.vectors
            if v.layer == 1
        }

    def outputs(self, *shape, dtype=None):
        """Two tensors full of NaN."""
        dtype = dtype or self.half
        return [torch.full(shape, torch.nan, dtype=dtype, device=self.device) for _ in range(2)]

    def normal(self, *shape):
        return torch.randn(shape, device=self.device)


@pytest.fixture(scope="module", params=CASES, ids=lambda p: "-".join(p))
def case(request, tmp_path_factory):
    torch.manual_seed(0)
    return Case(tmp_path_factory.mktemp("ops"), *request.param)


def assert_same(found, expected):
    """Rounded from sums in another order: equal, but for a few that go to their neighbour."""
    found, expected = found.float(), expected.float()
    assert (found == expected).float().mean() > 0.98
    step = 2.0**-7 * expected.abs() + 1e-5 * expected.abs().max()
    assert bool(((found - expected).abs() <= step).all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernels_compile_for_these_plans(tmp_path, variant):
    plan, _ = plan_for(tmp_path, variant)
    assert compile_kernel(plan, "prefill").resources.spill_bytes == 0


def test_every_matrix_is_unpacked_bit_by_bit(case):
    for matrix in case.plan.matrices:
        stored = case.image[matrix.offset : matrix.offset + matrix.nbytes]
        tiles = stored.view(matrix.num_tiles, matrix.tile_bytes)
        cols = padded_cols(matrix.weight_format, matrix.cols)
        found, expected = case.outputs(16 * matrix.num_tiles, cols)

        case.kernels.unpack(tiles, matrix.weight_format, found)

        case.plain.unpack(tiles, matrix.weight_format, expected)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("with_update", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_hidden_state_is_added_to_and_normalised(case, with_update, with_bias):
    size = case.plan.spec.hidden_size
    states = [case.normal(ROWS, size)]
    states.append(states[0].clone())
    bias = case.normal(size) if with_bias else None
    update = Update(case.normal(ROWS, size), bias) if with_update else None
    weight = case.vectors["input_layernorm"]
    found, expected = case.outputs(ROWS, size)

    case.kernels.add_norm(states[0], update, weight, found)

    case.plain.add_norm(states[1], update, weight, expected)
    assert torch.equal(*states)
    assert_same(found, expected)


@pytest.mark.parametrize("turned", [False, True])
def test_heads_are_normalised_turned_and_rounded(case, turned):
    layer = case.layer
    qkv = case.normal(ROWS, layer.qkv_rows)
    channels = -(-layer.head_dim // 16) * 16
    counts = (layer.num_q_heads, layer.num_kv_heads, layer.num_kv_heads)
    frequencies = torch.rand(layer.head_dim // 2, device=case.device)
    rotation = rotations(frequencies, 1.3, 70, ROWS) if turned else None
    pairs = [case.outputs(ROWS, n, channels, dtype=torch.bfloat16) for n in counts]

    case.kernels.split_heads(qkv, case.vectors, rotation, Heads(*(p[0] for p in pairs)))

    case.plain.split_heads(qkv, case.vectors, rotation, Heads(*(p[1] for p in pairs)))
    for found, expected in pairs:
        assert_same(found, expected)


@pytest.mark.parametrize("with_bias", [False, True])
def test_gate_and_up_become_activations(case, with_bias):
    matrix = case.plan.matrix("gate_up", 1)
    rows = 16 * matrix.num_tiles
    stored = torch.as_tensor(matrix.stored_tiles, dtype=torch.int32, device=case.device)
    pairs = case.normal(ROWS, rows).to(case.half)
    bias = case.normal(rows) if with_bias else None
    found, expected = case.outputs(ROWS, rows // 2)

    case.kernels.activate(pairs, bias, stored, found)

    case.plain.activate(pairs, bias, stored, expected)
    assert_same(found, expected)


def test_two_results_of_attention_are_blended(case):
    layer = case.layer
    shape = (ROWS, layer.num_q_heads, -(-layer.head_dim // 16) * 16)
    found, other = case.normal(2, *shape).bfloat16()
    expected = found.clone()
    share = torch.rand(layer.num_q_heads, ROWS, device=case.device)

    case.kernels.blend(found, other, share)

    case.plain.blend(expected, other, share)
    assert_same(found, expected)


def test_pages_are_stored_and_loaded_bit_by_bit(case):
    layer, page_tokens = case.layer, case.plan.machine.page_tokens
    channels = -(-layer.head_dim // 16) * 16
    ids = torch.tensor([4, 1, 3], device=case.device)
    tokens = len(ids) * page_tokens
    shape = (6, layer.num_kv_heads, 2, page_tokens * channels)
    found, expected = case.outputs(*shape, dtype=torch.bfloat16)
    keys, values = case.normal(2, tokens, layer.num_kv_heads, channels).bfloat16()

    case.kernels.store_pages(Pages(found, ids), keys.clone(), values.clone(), tokens - 19)

    case.plain.store_pages(Pages(expected, ids), keys, values, tokens - 19)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
    loaded, plain = (case.outputs(*keys.shape, dtype=torch.bfloat16) for _ in range(2))
    case.kernels.load_pages(Pages(found, ids), *loaded)
    case.plain.load_pages(Pages(found, ids), *plain)
    assert torch.equal(loaded[0], plain[0])
    assert torch.equal(loaded[1], plain[1])
