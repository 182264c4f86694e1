"""Prompts on a GPU: as exact as the kernel, the same bits whatever runs beside, memory foreseen."""

import numpy as np
import pytest
import torch

from checkpoints import VARIANTS, make_checkpoint
from flashformer.backends.base import StepBatch
from flashformer.backends.cuda.prefill import workspace_bytes
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import RandomWeights
from test_cuda import (
    BATCH,
    LENGTH,
    divergence,
    forward,
    head_dim,
    open_cuda,
    open_variant,
    table_of,
    transformers_logits,
)

pytestmark = pytest.mark.gpu

PROMPT = 100
# Heads that the kernel can take, where the variant's own are not: heads of 16, 24 or 40 channels.
WIDER = {"llama": {"head_dim": 24}, "qwen2": {"hidden_size": 96}, "smollm3": {"hidden_size": 96}}
WIDER["phi3"] = {"hidden_size": 160}
RUNNABLE = [v for v in VARIANTS if v != "phi3-longrope"]  # its factors are made for its 20 channels


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


@pytest.mark.parametrize("variant", RUNNABLE)
def test_prompts_and_what_follows_are_as_close_to_float32_as_transformers(tmp_path, variant):
    wider = {} if head_dim(variant) % 8 == 0 else WIDER[variant.split("-")[0]]
    folder = make_checkpoint(tmp_path, variant, **wider)
    backend = open_variant(lambda _: folder, variant)
    ids = random_ids(backend)
    exact = transformers_logits(folder, ids, torch.float32)
    rounded = transformers_logits(folder, ids, torch.bfloat16)

    prompt = forward(backend, ids[:PROMPT], rows=PROMPT)
    decoded = forward(backend, ids[PROMPT:], first=PROMPT, rows=1)

    backend.close()
    # fp16 models keep bf16 keys and values here, so bf16 arithmetic is what they are held to.
    bound = divergence(rounded, exact)
    assert divergence(np.concatenate([prompt, decoded]), exact) <= 1.05 * bound


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
    backend = open_cuda(spec, RandomWeights(spec), context=8192)
    table = table_of(backend, 8192)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() - workspace_held(backend)
    torch.cuda.reset_peak_memory_stats()

    for first in range(0, 8192, 2048):
        positions = np.arange(first, first + 2048, dtype=np.int32)
        slots = np.full(2048, BATCH - 1, np.int32)
        wanted = np.arange(1800, 2048, dtype=np.int32)
        backend.step(StepBatch(positions % 1000, positions, slots, table, wanted))

    used = torch.cuda.max_memory_allocated() - before
    backend.close()
    assert used <= workspace_bytes(backend.plan) <= 1.5 * used


def workspace_held(backend):
    """Bytes that the backend keeps between prompts."""
    prefill = backend._prefill
    kept = (prefill._slab, prefill._seen.keys, prefill._seen.values)
    return sum(tensor.nbytes for tensor in kept)
