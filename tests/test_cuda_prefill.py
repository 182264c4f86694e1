"""Prompts on a GPU: as exact as the kernel, the same bits whatever runs beside, memory foreseen."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from checkpoints import make_checkpoint
from flashformer.backends.base import StepBatch
from flashformer.backends.cuda.machine import cuda_machine
from flashformer.backends.cuda.prefill import Prefill, workspace_bytes
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.plan.plan import PlanOptions, make_plan
from test_cuda import (
    LENGTH,
    divergence,
    forward,
    head_dim,
    open_variant,
    table_of,
    transformers_logits,
)
from test_prefill import CHUNK, cuda_plan, image_of, prefill
from test_prefill import LENGTH as SHORT_LENGTH

pytestmark = pytest.mark.gpu

PROMPT = 100
# Heads that the kernel can take, where the variant's own are not: heads of 16, 24 or 40 channels.
WIDER = {"llama": {"head_dim": 24}, "qwen2": {"hidden_size": 96}, "smollm3": {"hidden_size": 96}}
WIDER["phi3"] = {"hidden_size": 160}
FAMILIES = (  # every path through the kernels of a prompt; test_prefill.py has the other variants
    *("llama-llama3", "llama-bias", "llama-f16", "mistral-window", "qwen2-window"),
    *("qwen3", "smollm3", "phi3", "phi3-window"),
)


def widened(folder, checkpoint, variant):
    """The variant's checkpoint, with heads that the kernel can take."""
    if head_dim(variant) % 8 == 0:
        return checkpoint(variant)
    return make_checkpoint(folder, variant, **WIDER[variant.split("-")[0]])


def random_ids(backend, length=LENGTH, seed=1):
    return np.random.default_rng(seed).integers(0, backend.plan.spec.vocab_size, length)


def prompt_beside(backend, ids, neighbours):
    """Logits of a prompt's rows in one step with a decoding row of each of `neighbours`."""
    tokens = np.array([*(5 for _ in neighbours), *ids], np.int32)
    positions = np.array([*(20 for _ in neighbours), *range(len(ids))], np.int32)
    slots = np.array([*neighbours, *(7 for _ in ids)], np.int32)
    rows = np.arange(len(tokens), dtype=np.int32)
    result = backend.step(StepBatch(tokens, positions, slots, table_of(backend), rows))
    return result.logits[len(neighbours) :].copy(), result.logits[: len(neighbours)].copy()


@pytest.mark.parametrize("variant", FAMILIES)
def test_prompts_are_as_close_to_float32_as_transformers(tmp_path, checkpoint, variant):
    folder = widened(tmp_path, checkpoint, variant)
    plan, weights = cuda_plan(lambda _: folder, variant)
    plan = replace(plan, machine=replace(plan.machine, arch=cuda_machine(plan.spec).arch))
    ids = np.random.default_rng(1).integers(0, plan.spec.vocab_size, SHORT_LENGTH, np.int32)
    exact = transformers_logits(folder, ids, torch.float32)
    rounded = transformers_logits(folder, ids, torch.bfloat16)

    logits, _ = prefill(plan, image_of(plan, weights), ids, CHUNK, device="cuda")

    # fp16 models keep bf16 keys and values here, so bf16 arithmetic is what they are held to.
    assert divergence(logits, exact) <= 1.05 * divergence(rounded, exact)


@pytest.mark.parametrize("variant", ["qwen3", "llama-f16", "mistral-window"])
def test_what_follows_a_prompt_is_as_close_to_float32(tmp_path, checkpoint, variant):
    folder = widened(tmp_path, checkpoint, variant)
    backend = open_variant(lambda _: folder, variant)
    ids = random_ids(backend)
    exact = transformers_logits(folder, ids, torch.float32)[PROMPT:]
    rounded = transformers_logits(folder, ids, torch.bfloat16)[PROMPT:]
    forward(backend, ids[:PROMPT], rows=PROMPT)

    decoded = forward(backend, ids[PROMPT:], first=PROMPT, rows=1)

    backend.close()
    assert divergence(decoded, exact) <= 1.05 * divergence(rounded, exact)


@pytest.fixture(scope="module")
def backend(checkpoint):
    opened = open_variant(checkpoint, "qwen3")
    yield opened
    opened.close()


def test_the_kernel_goes_on_from_a_prompt_as_from_its_own_past(backend):
    ids = random_ids(backend)
    forward(backend, ids[:PROMPT], slot=0)
    forward(backend, ids[:PROMPT], slot=1, rows=PROMPT)

    own = forward(backend, ids[PROMPT:], slot=0, first=PROMPT, rows=1)
    continued = forward(backend, ids[PROMPT:], slot=1, first=PROMPT, rows=1)

    # Each layer rounds a handful of numbers to bf16, by up to half of 2^-7 of them, in both.
    limit = backend.plan.spec.num_layers * 2.0**-7 * np.abs(own).max()
    assert 0 < np.abs(continued - own).max() <= limit
    gap = np.sort(own, axis=1)[:, -1] - np.sort(own, axis=1)[:, -2]
    clear = gap > 2 * limit
    assert clear.any()
    assert np.array_equal(own.argmax(1)[clear], continued.argmax(1)[clear])


def test_a_prompt_has_the_same_bits_alone_and_beside_seven_decoding_neighbours(backend):
    ids = random_ids(backend, PROMPT)
    for slot in range(7):
        forward(backend, random_ids(backend, 20, seed=slot), slot)
    alone, _ = prompt_beside(backend, ids, [])
    row, _ = prompt_beside(backend, ids[:9], [3])

    for _ in range(20):
        beside, decoded = prompt_beside(backend, ids, range(7))
        assert np.array_equal(beside, alone)
    assert np.array_equal(prompt_beside(backend, ids[:9], [3])[0], row)
    lone = prompt_beside(backend, ids, [3])[1]
    assert np.array_equal(lone[0], decoded[3])


def test_a_chunk_that_starts_within_a_page_continues_it(backend):
    ids = random_ids(backend)
    whole = forward(backend, ids, slot=2, rows=LENGTH)

    parts = forward(backend, ids, slot=4, rows=27)

    limit = backend.plan.spec.num_layers * 2.0**-7 * np.abs(whole).max()  # as above
    assert np.abs(parts - whole).max() <= limit


def test_the_workspace_of_a_real_shape_is_foreseen():
    spec = ModelSpec.from_hf({**SHAPES["llama-3.1-8b"], "num_hidden_layers": 2})
    plan = make_plan(spec, cuda_machine(spec), PlanOptions("bf16", "bf16", 8192, 1))
    layer, chunk = spec.layers[0], plan.machine.prompt_rows
    image = torch.zeros(plan.image_bytes, dtype=torch.uint8, device="cuda")
    kv = torch.zeros(2 * 8192 * 4 * layer.kv_rows, dtype=torch.uint8, device="cuda")
    pages = torch.arange(8192 // plan.machine.page_tokens, device="cuda")
    before = torch.cuda.memory_allocated()
    prompts = Prefill(plan, image, kv)
    prompts.warm_up(len(pages))
    torch.cuda.reset_peak_memory_stats()

    ids = np.arange(8192, dtype=np.int32) % 1000
    prompts.prompt(ids, 0, pages, np.arange(8192 - chunk // 8, 8192, dtype=np.int32))

    used = torch.cuda.max_memory_allocated() - before
    assert used <= workspace_bytes(plan) <= 1.5 * used
