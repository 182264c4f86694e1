"""Prefill through torch computes what the reference does and leaves pages as the kernel would."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import VARIANTS
from flashformer.backends.base import StepBatch
from flashformer.backends.cuda.prefill import Prefill
from flashformer.backends.reference import ReferenceBackend
from flashformer.errors import OutOfMemoryError
from flashformer.model.checkpoint import Checkpoint
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import CheckpointWeights
from flashformer.plan.machine import Machine
from flashformer.plan.pack import pack
from flashformer.plan.plan import PlanOptions, make_plan

PAGE_TOKENS = 32
NUM_PAGES = 9
PAGES = [7, 2, 5, 0]  # of the sequence, in order of position
SLOT = 2
LENGTH = 101  # no whole number of pages, chunks or fragments; llama-dynamic's table is made for it
CHUNK = 48  # begins and ends within a page
ORDER_OF_SUMS = 1e-5  # of the largest number: float32 throughout, as in test_parity
BF16 = 2.0**-7  # the largest distance of neighbouring bf16 numbers, relative to them


def cuda_plan(checkpoint, variant):
    """A plan as of a GPU, and the weights."""
    source = Checkpoint.open(checkpoint(variant))
    spec = ModelSpec.from_hf(source.config, source.generation_config)
    weights = CheckpointWeights(source, spec)
    machine = Machine(
        kind="cuda",
        name="test",
        arch="sm_90a",
        num_ctas=3,
        layout="fragment",
        page_tokens=PAGE_TOKENS,
        kv_format="bf16",
        max_rows=8,
        prompt_rows=CHUNK,
        slot_bytes=16384,
        window_bytes=32768,
    )
    name = "f16" if weights.dtype == "f16" else "bf16"
    return make_plan(spec, machine, PlanOptions(name, name, LENGTH, max_batch=4)), weights


def image_of(plan, weights):
    image = np.full(plan.image_bytes, 0xA5, np.uint8)
    pack(plan, weights, image)
    return image


def ids_of(plan, length=LENGTH):
    return np.random.default_rng(1).integers(0, plan.spec.vocab_size, length).astype(np.int32)


def fresh_pages(plan, device="cpu"):
    """Bytes of all pages, full of NaN: nothing may be read that was not written."""
    layer = plan.spec.layers[0]
    channels = -(-layer.head_dim // 16) * 16
    numbers = plan.spec.num_layers * NUM_PAGES * layer.num_kv_heads * 2 * PAGE_TOKENS * channels
    return torch.full((2 * numbers,), 0xFF, dtype=torch.uint8, device=device)


def prefill(plan, image, ids, chunk, activations=None, device="cpu"):
    """Logits of every row, and the pages."""
    kv = fresh_pages(plan, device)
    runner = Prefill(plan, torch.from_numpy(image).to(device), kv, activations)
    pages, logits = torch.tensor(PAGES, device=device), []
    for first in range(0, len(ids), chunk):
        part = torch.from_numpy(ids[first : first + chunk]).to(device, torch.int64)
        used = pages[: -(-(first + len(part)) // PAGE_TOKENS)]
        logits.append(runner.logits(runner.run(part, first, used, 0)))
    return torch.cat(logits).cpu().numpy(), kv.cpu()


def reference(plan, image, ids):
    """The oracle's logits of every row, and keys and values [layer, 2, position, head, dim]."""
    backend = ReferenceBackend(plan, image, NUM_PAGES)
    table = np.full((4, len(PAGES)), -1, np.int32)
    table[SLOT] = PAGES
    rows = np.arange(len(ids), dtype=np.int32)
    batch = StepBatch(ids, rows, np.full(len(ids), SLOT, np.int32), table, rows)
    logits = backend.step(batch).logits
    kv = np.stack([layer[:, PAGES].astype(np.float32) for layer in backend._kv])
    shape = (plan.spec.num_layers, 2, len(PAGES) * PAGE_TOKENS, *kv.shape[4:])
    return logits, kv.reshape(shape)[:, :, : len(ids)]


def key_offset(token, dim, dim_blocks):
    """kernel/past.cuh, once more: bytes of an element of a page of keys."""
    word = token % 16 // 8 * 2 + dim % 4 // 2
    lane = token % 8 * 4 + dim % 16 // 4
    return (token // 16 * dim_blocks + dim // 16) * 512 + lane * 16 + word * 4 + dim % 2 * 2


def value_offset(token, dim, dim_blocks):
    word = dim % 16 // 8 * 2 + token % 16 // 8
    lane = dim % 8 * 4 + token % 8 // 2
    return (token // 16 * dim_blocks + dim // 16) * 512 + lane * 16 + word * 4 + token % 2 * 2


def stored(plan, kv, length):
    """Keys and values as kernel/past.cuh finds them: [layer, 2, position, head, channel]."""
    layer = plan.spec.layers[0]
    dim_blocks = -(-layer.head_dim // 16)
    numbers = (kv.numpy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    page_shape = (layer.num_kv_heads, 2, PAGE_TOKENS * dim_blocks * 16)
    numbers = numbers.reshape(plan.spec.num_layers, NUM_PAGES, *page_shape)
    position, dim = np.arange(length)[:, None], np.arange(dim_blocks * 16)
    page = np.array(PAGES)[position // PAGE_TOKENS]
    found = []
    for part, offset in enumerate((key_offset, value_offset)):
        place = offset(position % PAGE_TOKENS, dim, dim_blocks) // 2
        found.append([numbers[:, page, head, part, place] for head in range(layer.num_kv_heads)])
    return np.array(found).transpose(2, 0, 3, 1, 4)


def assert_close(plan, logits, expected):
    """Equal but for the order of sums, and for keys and values that it rounds to a neighbour.

    Such a number moves what follows by no more than rounding does, and only there.
    """
    error = np.abs(logits - expected) / np.abs(expected).max()
    assert error.max() <= plan.spec.num_layers * BF16
    assert np.median(error) <= ORDER_OF_SUMS


def divergence(logits, expected):
    """Mean Kullback-Leibler divergence from `expected`, float64."""
    p = torch.log_softmax(torch.as_tensor(expected, dtype=torch.float64), -1)
    q = torch.log_softmax(torch.as_tensor(logits, dtype=torch.float64), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def transformers_logits(folder, ids, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        return model(torch.tensor(ids)[None]).logits[0].float().numpy()


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, checkpoint):
    plan, weights = cuda_plan(checkpoint, request.param)
    return request.param, plan, image_of(plan, weights)


@pytest.fixture(scope="module")
def qwen3(checkpoint):
    plan, weights = cuda_plan(checkpoint, "qwen3")
    return plan, image_of(plan, weights)


def test_the_numbers_are_those_of_the_reference(case):
    _, plan, image = case
    ids = ids_of(plan)
    expected, expected_kv = reference(plan, image, ids)

    logits, kv = prefill(plan, image, ids, CHUNK, torch.float32)

    found = stored(plan, kv, LENGTH)
    head_dim = expected_kv.shape[-1]
    assert (found[..., head_dim:] == 0).all()
    # Both round the same float32 numbers to bf16, but for the order of sums: nearly always to the
    # same one, seldom to its neighbour.
    found, expected_kv = found[0, ..., :head_dim], expected_kv[0]
    assert (found == expected_kv).mean() > 0.99
    largest = np.abs(expected_kv).max()
    allowed = BF16 * np.abs(expected_kv) + ORDER_OF_SUMS * largest
    assert (np.abs(found - expected_kv) <= allowed).all()
    assert_close(plan, logits, expected)


def test_16_bit_activations_are_as_close_to_float32_as_those_of_transformers(case, checkpoint):
    variant, plan, image = case
    ids = ids_of(plan)
    exact = transformers_logits(checkpoint(variant), ids, torch.float32)
    # fp16 models keep bf16 keys and values here, so bf16 arithmetic is what they are held to.
    rounded = transformers_logits(checkpoint(variant), ids, torch.bfloat16)

    logits, _ = prefill(plan, image, ids, CHUNK)

    assert divergence(logits, exact) <= 1.05 * divergence(rounded, exact)


def test_a_prompt_is_cut_into_chunks_and_gives_the_logits_that_are_wanted(qwen3, monkeypatch):
    plan, image = qwen3
    monkeypatch.setattr("flashformer.backends.cuda.prefill.LOGIT_ROWS", 2)
    whole, kv = prefill(plan, image, ids_of(plan), CHUNK, torch.float32)
    own = fresh_pages(plan)
    runner = Prefill(plan, torch.from_numpy(image), own, torch.float32)
    pages = torch.tensor([*PAGES, -1])

    runner.prompt(ids_of(plan)[:60], 0, pages, np.empty(0, np.int32))
    wanted = np.array([1, 30, 31, 33, 40], np.int32)
    found = runner.prompt(ids_of(plan)[60:], 60, pages, wanted)

    assert found.dtype == np.float32
    assert_close(plan, found, whole[60 + wanted])
    same = stored(plan, own, LENGTH) == stored(plan, kv, LENGTH)
    assert same.mean() > 0.99


def test_memory_that_others_took_is_one_sentence(qwen3, monkeypatch):
    plan, image = qwen3
    runner = Prefill(plan, torch.from_numpy(image), fresh_pages(plan))

    def refuse(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("flashformer.backends.cuda.prefill.multiply", refuse)
    with pytest.raises(OutOfMemoryError, match="something else has taken it since"):
        runner.prompt(ids_of(plan), 0, torch.tensor(PAGES), np.empty(0, np.int32))


def test_warming_up_needs_no_more_pages_than_there_are(qwen3):
    plan, image = qwen3
    kv = fresh_pages(plan)
    runner = Prefill(plan, torch.from_numpy(image), kv)

    runner.warm_up(1)

    layer = plan.spec.layers[0]
    pages = kv.view(plan.spec.num_layers, NUM_PAGES, layer.num_kv_heads, 2, -1)
    assert not pages[:, 0].contiguous().view(torch.bfloat16).isnan().any()
    assert (pages[:, 1:] == 0xFF).all()
    runner.warm_up(NUM_PAGES)


def test_other_pages_stay_and_the_rest_of_the_last_page_is_zero(qwen3):
    plan, image = qwen3
    layer = plan.spec.layers[0]

    _, kv = prefill(plan, image, ids_of(plan), CHUNK)

    pages = kv.view(plan.spec.num_layers, NUM_PAGES, layer.num_kv_heads, 2, -1)
    others = [page for page in range(NUM_PAGES) if page not in PAGES]
    assert (pages[:, others] == 0xFF).all()
    assert (stored(plan, kv, len(PAGES) * PAGE_TOKENS)[:, :, LENGTH:] == 0).all()


def test_a_chunk_continues_pages_that_were_written_before(qwen3):
    plan, image = qwen3
    ids = ids_of(plan)
    whole, _ = prefill(plan, image, ids, LENGTH, torch.float32)

    parts, _ = prefill(plan, image, ids, 11, torch.float32)

    assert_close(plan, parts, whole)


@pytest.mark.parametrize("wanted_from", [LENGTH - 1, 40])
def test_rows_that_nobody_wants_change_nothing(qwen3, wanted_from):
    plan, image = qwen3
    ids, pages = torch.from_numpy(ids_of(plan)).long(), torch.tensor(PAGES)
    logits, kv = prefill(plan, image, ids_of(plan), LENGTH, torch.float32)
    own = fresh_pages(plan)
    runner = Prefill(plan, torch.from_numpy(image), own, torch.float32)

    found = runner.logits(runner.run(ids, 0, pages, wanted_from)).numpy()

    assert_close(plan, found, logits[wanted_from:])
    assert torch.equal(own, kv)
    assert len(runner.run(ids, 0, pages, LENGTH)) == 0  # none at all: keys and values alone
    assert torch.equal(own, kv)


def test_matrices_beyond_the_slab_are_unpacked_piece_by_piece(qwen3, monkeypatch):
    plan, image = qwen3
    whole, _ = prefill(plan, image, ids_of(plan), CHUNK, torch.float32)
    monkeypatch.setattr("flashformer.backends.cuda.prefill_slab.SLAB_BYTES", 1)

    pieces, _ = prefill(plan, image, ids_of(plan), CHUNK, torch.float32)

    assert_close(plan, pieces, whole)
