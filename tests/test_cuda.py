"""The CUDA kernel on a GPU: right, and the same bits whatever runs beside it."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import VARIANTS
from flashformer.backends import open_backend
from flashformer.backends.base import DecodeRow, StepBatch
from flashformer.errors import UnsupportedModelError
from flashformer.model.checkpoint import Checkpoint
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import AnyWeights, CheckpointWeights, RandomWeights
from flashformer.plan.plan import PlanOptions

pytestmark = pytest.mark.gpu

LENGTH = 128
BATCH = 8


def open_cuda(spec, weights, context=LENGTH, name="bf16"):
    options = PlanOptions(name, name, context, max_batch=BATCH)
    pages = BATCH * (-(-context // 16) + 1)
    return open_backend("cuda", spec, weights, options, num_pages=pages)


def open_variant(checkpoint, variant):
    source = Checkpoint.open(checkpoint(variant))
    spec = ModelSpec.from_hf(source.config, source.generation_config)
    weights = CheckpointWeights(source, spec)
    return open_cuda(spec, weights, name="f16" if weights.dtype == "f16" else "bf16")


def table_of(backend, context=LENGTH):
    """Every slot with its own pages, in an order that is not the pages'."""
    pages = -(-context // backend.plan.machine.page_tokens)
    return np.random.default_rng(0).permutation(BATCH * pages).reshape(BATCH, pages).astype("i4")


def forward(backend, ids, slot=3, first=0, rows=BATCH):
    """Logits of every position from `first` on, `rows` of them a step: at most 8 use the kernel."""
    logits = []
    for start in range(0, len(ids), rows):
        part = np.asarray(ids[start : start + rows], np.int32)
        wanted = np.arange(len(part), dtype=np.int32)
        slots = np.full(len(part), slot, np.int32)
        positions = wanted + np.int32(first + start)
        batch = StepBatch(part, positions, slots, table_of(backend), wanted)
        logits.append(backend.step(batch).logits)
    return np.concatenate(logits)


def decode_rows(backend, tokens, positions, slots):
    rows = np.arange(len(tokens), dtype=np.int32)
    arrays = (np.asarray(a, np.int32) for a in (tokens, positions, slots))
    return backend.step(StepBatch(*arrays, table_of(backend), rows))


def divergence(logits, reference):
    """Mean Kullback-Leibler divergence from the reference, float64."""
    p = torch.log_softmax(torch.as_tensor(reference, dtype=torch.float64), -1)
    q = torch.log_softmax(torch.as_tensor(logits, dtype=torch.float64), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def transformers_logits(folder, ids, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to("cuda")
    with torch.no_grad():
        return model(torch.tensor(ids, device="cuda")[None]).logits[0].float().cpu().numpy()


def head_dim(variant):
    fields = VARIANTS[variant][0]
    return fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]


def test_every_token_of_a_launch_has_a_time_and_is_the_one_that_an_iterator_gives():
    config = {**SHAPES["smollm2-135m"], "num_hidden_layers": 2}
    backend = open_cuda(ModelSpec.from_hf(config), AnyWeights(ModelSpec.from_hf(config)), 128)
    rows, table = [DecodeRow(11, 0, 0)], table_of(backend, 128)
    expected = list(backend.launch(rows, table, 60))
    times = backend.token_times(rows, table, 60)
    again = list(backend.launch(rows, table, 60))
    backend.close()
    assert len(times) == len(expected) == 60
    assert (np.diff(times) > 0).all()
    assert np.array_equal(expected, again)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if head_dim(v) % 8 != 0])
def test_heads_that_are_no_whole_packets_are_refused(checkpoint, variant):
    with pytest.raises(UnsupportedModelError, match="head_dim"):
        open_variant(checkpoint, variant)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if head_dim(v) % 8 == 0])
def test_logits_are_as_close_to_float32_as_those_of_transformers_in_16_bits(checkpoint, variant):
    backend = open_variant(checkpoint, variant)
    ids = np.random.default_rng(1).integers(0, backend.plan.spec.vocab_size, LENGTH)
    half = torch.float16 if backend.plan.options.format == "f16" else torch.bfloat16
    exact = transformers_logits(checkpoint(variant), ids, torch.float32)
    rounded = divergence(transformers_logits(checkpoint(variant), ids, half), exact)

    ours = divergence(forward(backend, ids), exact)

    backend.close()
    # fp16 models keep bf16 keys and values here, so bf16 arithmetic is what they are held to.
    bound = (
        rounded
        if half is torch.bfloat16
        else divergence(transformers_logits(checkpoint(variant), ids, torch.bfloat16), exact)
    )
    assert ours <= 1.05 * bound


@pytest.fixture(scope="module")
def backend(checkpoint):
    opened = open_variant(checkpoint, "qwen3")
    yield opened
    opened.close()


def history(backend, slots, length):
    """Give every slot a different past of `length` tokens."""
    rng = np.random.default_rng(2)
    for slot in slots:
        forward(backend, rng.integers(0, backend.plan.spec.vocab_size, length), slot)


def test_a_row_of_a_batch_has_the_bits_of_the_same_row_alone(backend):
    history(backend, range(BATCH), 100)
    together = decode_rows(backend, [5] * BATCH, [100] * BATCH, range(BATCH)).logits

    for slot in range(BATCH):
        alone = decode_rows(backend, [5], [100], [slot]).logits
        assert np.array_equal(alone[0], together[slot])


def test_a_thousand_repeats_have_the_same_bits(backend):
    history(backend, range(BATCH), 100)
    first = decode_rows(backend, [5] * BATCH, [100] * BATCH, range(BATCH)).logits.copy()

    for _ in range(1000):
        again = decode_rows(backend, [5] * BATCH, [100] * BATCH, range(BATCH)).logits
        assert np.array_equal(again, first)


def test_many_tokens_a_launch_are_the_tokens_of_many_launches(backend):
    history(backend, [0, 1], 50)
    tokens, expected = [7, 9], []
    for i in range(40):
        tokens = decode_rows(backend, tokens, [50 + i] * 2, [0, 1]).argmax
        expected.append(tokens)

    arrays = (np.asarray(a, np.int32) for a in ([7, 9], [50, 50], [0, 1]))
    found = backend.decode(*arrays, table_of(backend), num_steps=40)

    assert np.array_equal(found, np.array(expected))


def test_sequences_of_different_lengths_share_a_step(backend):
    history(backend, [0], 20)
    history(backend, [1], 90)
    together = decode_rows(backend, [3, 4], [20, 90], [0, 1]).logits

    assert np.array_equal(decode_rows(backend, [3], [20], [0]).logits[0], together[0])
    assert np.array_equal(decode_rows(backend, [4], [90], [1]).logits[0], together[1])


def test_stopping_after_a_stage_leaves_the_kernel_usable(backend):
    history(backend, [0], 10)
    before = decode_rows(backend, [3], [10], [0]).logits.copy()
    arrays = (np.asarray(a, np.int32) for a in ([3], [10], [0]))
    backend.decode(*arrays, table_of(backend), num_steps=1, stop_after=3)

    assert np.array_equal(decode_rows(backend, [3], [10], [0]).logits, before)


def test_a_model_of_real_shape_decodes_the_same_bits_at_any_batch():
    spec = ModelSpec.from_hf(
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
        }
    )
    context = 2048
    backend = open_cuda(spec, RandomWeights(spec), context)
    pages = table_of(backend, context)
    arrays = (np.asarray(a, np.int32) for a in ([11] * BATCH, [0] * BATCH, range(BATCH)))
    together = backend.decode(*arrays, pages, num_steps=300)
    arrays = (np.asarray(a, np.int32) for a in ([11], [0], [5]))
    alone = backend.decode(*arrays, pages, num_steps=300)
    backend.close()

    assert np.array_equal(together, np.repeat(alone, BATCH, axis=1))
