"""What the kernel is measured beside computes the same model, or the comparison says so."""

import numpy as np
import pytest
import torch

import baselines
from baselines import ALLOWED, LOOP, OURS, REFERENCE, TRANSFORMERS, Compiled, checks, teacher_forced
from checkpoints import LLAMA
from flashformer.backends.cuda.compile import build_cubin
from flashformer.backends.cuda.machine import Device, fit_machine
from flashformer.backends.cuda.random_image import random_image
from flashformer.codegen.cuda_header import render_cuda
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.plan.machine import Machine
from flashformer.plan.plan import PlanOptions, make_plan
from prefill_checks import divergence, twin_logits
from test_prefill import ids_of
from torch_loop import TorchLoop

BEFORE, TOKENS, POSITIONS = 12, 40, 64


@pytest.fixture(scope="module")
def case():
    """A plan, its random image, ids, and logits by transformers: bf16, float32."""
    machine = Machine("cuda", "test", "sm_90a", 3, "fragment", 32, "bf16", 8, prompt_rows=64)
    plan = make_plan(ModelSpec.from_hf(LLAMA), machine, PlanOptions("bf16", "bf16", 64, 1))
    image = random_image(plan, torch.device("cpu"))
    ids = ids_of(plan, TOKENS)
    return plan, image, ids, twin_logits(plan, image, LLAMA, ids)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(baselines, "CONTEXT", BEFORE)
    monkeypatch.setattr(baselines, "POSITIONS", POSITIONS)


def peer(name, plan, image):
    if name == LOOP:
        return TorchLoop(plan, image, POSITIONS)
    return Compiled(plan, image, LLAMA)


@pytest.mark.parametrize("name", [LOOP, TRANSFORMERS])
def test_a_peer_is_about_as_close_to_float32_as_transformers(case, short, name):
    plan, image, ids, (rounded, exact) = case
    found = teacher_forced(ids, peer(name, plan, image).logits_of)
    assert len(found) == TOKENS - BEFORE
    limit = ALLOWED[name] * divergence(rounded[BEFORE:], exact[BEFORE:])
    assert 0 < divergence(found, exact[BEFORE:]) <= limit


@pytest.mark.parametrize("name", [LOOP, TRANSFORMERS])
def test_a_peer_feeds_its_own_tokens_back(case, short, name):
    plan, image, ids, _ = case
    one = peer(name, plan, image)
    fed = [int(ids[0])]
    for position in range(6):
        fed.append(int(one.logits_of(fed[-1], position).argmax()))
    one.start(fed[0], 0)
    for _ in range(6):
        one.next()
    assert int(one.token) == fed[-1]


def test_a_peer_with_a_wrong_weight_does_not_pass(case, short):
    plan, image, ids, (rounded, exact) = case
    loop = TorchLoop(plan, image, POSITIONS)
    loop.layers[0][2].mul_(1.5)
    found = divergence(teacher_forced(ids, loop.logits_of), exact[BEFORE:])
    reference = divergence(rounded[BEFORE:], exact[BEFORE:])
    assert not checks({LOOP: found, OURS: 0.0, REFERENCE: reference}, None)["passed"]


def test_a_chain_that_draws_other_tokens_does_not_pass():
    right = {OURS: 1.0, REFERENCE: 1.0}
    assert checks(right, True)["passed"]
    assert not checks(right, False)["passed"]
    assert not checks({**right, OURS: 1.1}, True)["passed"]


def test_the_chain_compiles_without_spills():
    from chain import HERE

    spec = ModelSpec.from_hf(SHAPES["llama-3.2-1b"])
    device = Device("H200", 9, 0, 132, 227 << 10, cooperative=True)
    plan = make_plan(spec, fit_machine(device, spec), PlanOptions(context=256, max_batch=1))
    cubin = build_cubin(render_cuda(plan, rows=1), "chain", "sm_90a", HERE)
    assert cubin.resources.spill_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("position", [3, 700])
def test_the_chain_draws_the_tokens_of_the_kernel_at_every_replay(position):
    from chain import Chain
    from flashformer.backends.cuda import CudaBackend, cuda_machine
    from flashformer.serve.benchmark.cases import Case
    from flashformer.serve.benchmark.steps import Steps

    spec = ModelSpec.from_hf({**SHAPES["llama-3.2-1b"], "num_hidden_layers": 3})
    plan = make_plan(spec, cuda_machine(spec), PlanOptions("bf16", "bf16", 1024, 1))
    image = random_image(plan, torch.device("cuda"))
    backend = CudaBackend(plan, image, 1024 // plan.machine.page_tokens)
    steps = Steps.of(backend)
    steps.fill([position], lambda *_: None)
    expected = steps.run(Case("tg", 20, position, 1)).tokens[:, 0]
    chain = Chain(backend, steps.page_table, int(steps.random_ids(1)[0]), position, 20)
    for _ in range(3):
        assert np.array_equal(chain.run(), expected)
        assert np.array_equal(steps.run(Case("tg", 20, position, 1)).tokens[:, 0], expected)
    chain.close()
    backend.close()
