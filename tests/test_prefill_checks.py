"""The yardstick of the prompts' benchmark: transformers with the weights of the same image."""

import pytest
import torch

from checkpoints import LLAMA, LONGROPE, PHI3, QWEN3
from flashformer.backends.cuda.random_image import random_image
from flashformer.backends.reference import ReferenceBackend
from flashformer.model.spec import ModelSpec
from flashformer.plan.machine import Machine
from flashformer.plan.plan import PlanOptions, make_plan
from flashformer.serve.benchmark.steps import Steps
from prefill_checks import ALLOWED, checks, divergence, twin_logits
from test_prefill import ids_of, prefill

CONFIGS = {"llama": LLAMA, "qwen3-tied": QWEN3, "phi3-fused": PHI3 | LONGROPE}
TOKENS = 40


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def case(request):
    """A plan, its random image, config.json, ids, and logits by transformers: bf16, float32."""
    machine = Machine("cuda", "test", "sm_90a", 3, "fragment", 32, "bf16", 8, prompt_rows=64)
    spec = ModelSpec.from_hf(request.param)
    plan = make_plan(spec, machine, PlanOptions("bf16", "bf16", 128, 2))
    image = random_image(plan, torch.device("cpu"))
    ids = ids_of(plan, TOKENS)
    return plan, image, request.param, ids, twin_logits(plan, image, request.param, ids)


def test_prompts_are_as_close_to_the_twin_in_float32_as_the_twin_in_bf16(case):
    plan, image, _, ids, (rounded, exact) = case

    logits, _ = prefill(plan, image.numpy(), ids, TOKENS)

    assert 0 < divergence(logits, exact) <= ALLOWED * divergence(rounded, exact)


def backend_of(plan, image):
    pages = 2 * -(-plan.options.context // plan.machine.page_tokens)
    return ReferenceBackend(plan, image.numpy(), pages)


def test_a_backend_that_is_exact_passes(case):
    plan, image, config, *_ = case
    backend = backend_of(plan, image)

    found = checks(backend, Steps.of(backend), image, config)

    assert found["passed"]
    assert found["repeat_bit_equal"]


def test_one_wrong_tile_of_one_layer_does_not_pass(case):
    plan, image, config, *_ = case
    damaged = image.clone()
    matrix = plan.matrix("o_proj", 0)
    damaged[matrix.offset : matrix.offset + matrix.tile_bytes] = 0
    backend = backend_of(plan, damaged)

    found = checks(backend, Steps.of(backend), image, config)

    assert not found["passed"]
    assert found["repeat_bit_equal"]
