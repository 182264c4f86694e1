"""The CUDA kernel under delays, stale memory, wrapped counters and lost packets."""

import itertools
import time

import numpy as np
import pytest

from flashformer.backends.base import StepBatch
from flashformer.codegen.cuda_header import MATRICES
from flashformer.codegen.instruments import Instruments
from flashformer.errors import FlashFormerError
from flashformer.model.spec import RopeSpec
from flashformer.plan.plan import PlanOptions, make_plan
from specs import SpecWeights, layer_spec, model_spec, packed

pytestmark = pytest.mark.gpu

CONTEXT = 448
SLOTS = 8
STEPS = 6
LAYERS = 2
PAST = 300  # positions of slot 0: two chunks; those of the last slots are one


def open_backend(instruments=None):
    """A small model of wide layers: many CTAs, an odd size, a window in one layer."""
    from flashformer.backends.cuda import CudaBackend, cuda_machine

    fields = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64, "intermediate_size": 4501}
    layers = tuple(layer_spec(**fields, attention_scale=0.125, window=window) for window in (0, 40))
    spec = model_spec(
        layers,
        hidden_size=1111,
        vocab_size=2003,
        max_position_embeddings=CONTEXT,
        ropes=(RopeSpec("default", 10000.0, 64, CONTEXT),),
    )
    plan = make_plan(spec, cuda_machine(spec), PlanOptions("bf16", "bf16", CONTEXT, SLOTS))
    pages = -(-CONTEXT // plan.machine.page_tokens)
    image = packed(plan, SpecWeights(spec, seed=5))
    return CudaBackend(plan, image, SLOTS * pages, instruments or Instruments())


def page_table(backend):
    pages = -(-CONTEXT // backend.plan.machine.page_tokens)
    return np.arange(SLOTS * pages, dtype=np.int32)[::-1].reshape(SLOTS, pages)


def fill(backend):
    """Slot s holds PAST - 9 s positions."""
    rng = np.random.default_rng(1)
    for slot in range(SLOTS):
        count = PAST - 9 * slot
        ids = rng.integers(0, backend.plan.spec.vocab_size, count).astype(np.int32)
        arrays = ids, np.arange(count, dtype=np.int32), np.full(count, slot, np.int32)
        backend.step(StepBatch(*arrays, page_table(backend), np.zeros(0, np.int32)))


def decoded(backend, batch):
    """Tokens of STEPS steps of `batch` rows, and the logits of the last."""
    slots = np.arange(batch, dtype=np.int32)
    ids, positions = (11 + slots).astype(np.int32), (PAST - 9 * slots).astype(np.int32)
    tokens = backend.decode(ids, positions, slots, page_table(backend), STEPS)
    return tokens, backend.logits[:batch].cpu().numpy()


def equal(found, expected):
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def calm():
    """What an undisturbed kernel computes, by batch."""
    backend = open_backend()
    fill(backend)
    results = {batch: decoded(backend, batch) for batch in (1, 3, 8)}
    backend.close()
    assert all(np.isfinite(logits).all() for _, logits in results.values())
    return results


def test_random_sleeps_at_hand_offs_change_no_bit_for_200_seeds(calm):
    backend = open_backend(Instruments(delay_ns=20_000))
    fill(backend)
    for seed in range(200):
        backend.delay_seed = seed
        for batch, expected in calm.items():
            assert equal(decoded(backend, batch), expected), (seed, batch)
    backend.close()


def test_memory_full_of_nan_before_every_launch_changes_no_bit(calm):
    backend = open_backend(Instruments(poison=True))
    fill(backend)
    for batch, expected in calm.items():
        assert equal(decoded(backend, batch), expected), batch
    backend.close()


@pytest.mark.parametrize("start", [0, 2**31])
def test_the_barrier_s_counter_wraps_without_notice(calm, start):
    """Every second barrier wraps it; which one depends on where it stood."""
    backend = open_backend(Instruments(counter_start=start))
    fill(backend)
    for batch, expected in calm.items():
        assert equal(decoded(backend, batch), expected), batch
    backend.close()


def test_the_number_of_a_layer_wraps_without_notice(calm):
    """It dates the partial results of attention."""
    from flashformer.backends.cuda.backend import NO_EPOCH

    backend = open_backend()
    fill(backend)
    for left in range(1, STEPS * LAYERS * 2):
        backend.epoch = NO_EPOCH - left
        assert equal(decoded(backend, 3), calm[3])
        assert backend.epoch < NO_EPOCH
    backend.close()


def test_ten_thousand_launches_neither_hang_nor_change_a_bit(calm):
    backend = open_backend()
    fill(backend)
    slots = np.arange(3, dtype=np.int32)
    ids, positions = (11 + slots).astype(np.int32), (PAST - 9 * slots).astype(np.int32)
    table = page_table(backend)
    expected = backend.decode(ids, positions, slots, table, 1)
    logits = backend.logits[:3].clone()
    for _ in range(10_000):
        assert np.array_equal(backend.decode(ids, positions, slots, table, 1), expected)
        assert bool((backend.logits[:3] == logits).all())
    assert equal(decoded(backend, 8), calm[8])
    backend.close()


def senders_of(plan, matrix):
    """The CTAs that have a tile of a matrix, numbered as the kernel does, from 1 on."""
    layer, kind = divmod(matrix - 1, len(MATRICES))
    split = plan.matrix(MATRICES[kind], layer).first_tile
    return [cta for cta, (first, end) in enumerate(itertools.pairwise(split)) if first < end]


def test_a_lost_packet_ends_in_an_error_that_names_the_wait_and_leaves_a_usable_kernel(calm):
    backend = open_backend(Instruments(faults=True))
    fill(backend)
    backend.wait_limit_ns = 20_000_000
    for matrix in range(1, 4 * LAYERS + 1):
        senders = senders_of(backend.plan, matrix)
        for cta in (senders[0], senders[len(senders) // 2], senders[-1]):
            backend.drop = (matrix, cta)
            started = time.perf_counter()
            with pytest.raises(FlashFormerError, match="waited for a packet of another CTA, at"):
                decoded(backend, 3)
            assert time.perf_counter() - started < 1.0
            backend.drop = (0, 0)
            assert equal(decoded(backend, 3), calm[3])
    backend.close()


def test_the_error_of_a_lost_packet_names_the_stage_that_starved():
    backend = open_backend(Instruments(faults=True))
    fill(backend)
    backend.wait_limit_ns = 20_000_000
    starved = {
        1: "o_proj of layer 0",
        2: "gate_up of layer 0",
        3: "down of layer 0",
        4: "qkv of layer 1",
    }
    for matrix, stage in starved.items():
        backend.drop = (matrix, senders_of(backend.plan, matrix)[0])
        with pytest.raises(FlashFormerError, match=f"at {stage}"):
            decoded(backend, 1)
    backend.close()


def test_the_timeline_holds_every_stage_of_every_cta_in_order():
    from flashformer.codegen.instruments import MOMENTS, TRACKS

    backend = open_backend(Instruments(trace_moments=200))
    fill(backend)
    backend.trace.zero_()
    decoded(backend, 3)
    words = backend.trace.cpu().numpy().astype(np.uint64)
    backend.close()
    matrices = [f"{name}" for name in ("qkv", "o_proj", "gate_up", "down")]
    step = ["embed"]
    for _ in range(LAYERS):
        for name in matrices:
            step += ["attention"] * (name == "o_proj") + [f"{name}_input", name]
    step += ["lm_head_input", "lm_head", "meet", "sample"]
    fills = [
        f for name in matrices for f in (["past_fill"] * (name == "o_proj") + [f"{name}_fill"])
    ]
    expected = {
        "consumers": ["start", *step * STEPS],
        "producer": ["first_fill", *(fills * LAYERS + ["lm_head_fill"]) * STEPS],
    }
    for cta in range(words.shape[0]):
        for track, name in enumerate(TRACKS):
            used = words[cta, track][words[cta, track, :, 0] != 0]
            found = [MOMENTS[int(word) & 255].name for word in used[:, 0]]
            assert found == expected[name][:200]
            times = used[:, 0] >> np.uint64(16)
            assert (np.diff(times.astype(np.int64)) >= 0).all()
