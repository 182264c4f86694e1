"""The yardstick of the prompts' benchmark: transformers with the weights of the same image."""

import pytest
import torch

from checkpoints import LLAMA, LONGROPE, PHI3, QWEN3
from flashformer.backends.cuda.random_image import random_image
from flashformer.model.spec import ModelSpec
from flashformer.plan.machine import Machine
from flashformer.plan.plan import PlanOptions, make_plan
from prefill_checks import ALLOWED, divergence, twin_logits
from test_prefill import ids_of, prefill

CONFIGS = {"llama": LLAMA, "qwen3-tied": QWEN3, "phi3-fused": PHI3 | LONGROPE}
TOKENS = 40


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def case(request):
    """A plan, its random image, ids, and logits by transformers: bf16, float32."""
    machine = Machine("cuda", "test", "sm_90a", 3, "fragment", 32, "bf16", 8, prompt_rows=64)
    spec = ModelSpec.from_hf(request.param)
    plan = make_plan(spec, machine, PlanOptions("bf16", "bf16", 128, 2))
    image = random_image(plan, torch.device("cpu"))
    ids = ids_of(plan, TOKENS)
    return plan, image, ids, twin_logits(plan, image, request.param, ids)


def test_prompts_are_as_close_to_the_twin_in_float32_as_the_twin_in_bf16(case):
    plan, image, ids, (rounded, exact) = case

    logits, _ = prefill(plan, image.numpy(), ids, TOKENS)

    assert 0 < divergence(logits, exact) <= ALLOWED * divergence(rounded, exact)


def test_one_wrong_layer_is_further_away_than_rounding(case):
    plan, image, ids, (rounded, exact) = case
    damaged = image.clone()
    matrix = plan.matrix("o_proj", 0)
    damaged[matrix.offset : matrix.offset + matrix.tile_bytes] = 0

    logits, _ = prefill(plan, damaged.numpy(), ids, TOKENS)

    assert divergence(logits, exact) > 2 * ALLOWED * divergence(rounded, exact)
