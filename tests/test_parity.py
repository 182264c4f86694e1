"""Every backend gives the logits and the greedy tokens of transformers, for every family."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import VARIANTS
from flashformer.backends import open_backend
from flashformer.backends.base import StepBatch
from flashformer.model.checkpoint import Checkpoint
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import CheckpointWeights
from flashformer.plan.plan import PlanOptions

# Of the largest logit. float32 throughout: sums of up to 321 products in 4 layers round by some
# 2^-24 x sqrt(321) each, 1e-6 in all; ten times that allows for another order of the sums.
# Keys and values in 16 bits: each rounds by 2^-9 (bf16) of itself, and the softmax averages them.
TOLERANCES = {"f32": 1e-5, "f16": 5e-4, "bf16": 2e-3}
BACKENDS = ("reference", "cpu")
LENGTH = 128  # beyond the windows, the pages and one step's rows; the most that llama-dynamic has
SHORT = 30  # within the original context of every scaled RoPE
STEPS = 64


@pytest.fixture(scope="module")
def transformers_logits(checkpoint):
    """`transformers_logits("qwen3", ids)` -> float32 [len(ids), vocab]."""
    models = {}

    def logits(variant, ids):
        if variant not in models:
            folder = checkpoint(variant)
            models[variant] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            return models[variant](torch.tensor(ids)[None]).logits[0].numpy()

    return logits


@pytest.fixture(params=BACKENDS)
def backend_of(request, checkpoint, tmp_path, monkeypatch):
    """`backend_of("qwen3", context)` -> an open backend of that checkpoint, exact weights."""
    monkeypatch.setenv("FLASHFORMER_CACHE_DIR", str(tmp_path / "cache"))
    opened = []

    def open_variant(variant, context):
        source = Checkpoint.open(checkpoint(variant))
        spec = ModelSpec.from_hf(source.config, source.generation_config)
        weights = CheckpointWeights(source, spec)
        options = PlanOptions(weights.dtype, weights.dtype, context, max_batch=1)
        opened.append(open_backend(request.param, spec, weights, options, num_pages=40, threads=2))
        return opened[-1]

    yield open_variant
    for backend in opened:
        backend.close()


def run(backend, ids, first=0):
    """Logits of `ids` at positions from `first` on, in steps of as many rows as fit."""
    machine, logits = backend.plan.machine, []
    pages = -(-backend.plan.options.context // machine.page_tokens)
    table = np.arange(pages, dtype=np.int32)[None, ::-1].copy()  # pages need not be in order
    for start in range(0, len(ids), machine.max_rows):
        part = np.array(ids[start : start + machine.max_rows], np.int32)
        rows = np.arange(len(part), dtype=np.int32)
        slots = np.zeros(len(part), np.int32)
        batch = StepBatch(part, rows + np.int32(first + start), slots, table, rows)
        logits.append(backend.step(batch).logits.copy())
    return np.concatenate(logits)


def some_ids(backend, length):
    return ((np.arange(length) * 7 + 3) ** 2 % backend.plan.spec.vocab_size).tolist()


def assert_close(backend, found, expected):
    tolerance = TOLERANCES[backend.plan.machine.kv_format]
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_logits_of_a_prompt_are_those_of_transformers(variant, backend_of, transformers_logits):
    backend = backend_of(variant, LENGTH)
    ids = some_ids(backend, LENGTH)
    assert_close(backend, run(backend, ids), transformers_logits(variant, ids))


@pytest.mark.parametrize("variant", ["llama-dynamic", "phi3-longrope"])
def test_a_short_context_uses_the_tables_of_a_short_context(
    variant, backend_of, transformers_logits
):
    backend = backend_of(variant, SHORT)
    ids = some_ids(backend, SHORT)
    assert_close(backend, run(backend, ids), transformers_logits(variant, ids))


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_of_transformers_for_64_steps(
    variant, backend_of, transformers_logits
):
    # transformers grows the table of dynamic scaling while it decodes, here it is made for the
    # whole context: the two are the same model up to the original 64 positions only.
    prompt_length = 1 if variant == "llama-dynamic" else LENGTH - STEPS + 1
    backend = backend_of(variant, prompt_length + STEPS - 1)
    ids = some_ids(backend, prompt_length)
    logits = run(backend, ids)[-1]
    for _ in range(STEPS):
        ids.append(int(logits.argmax()))
        if len(ids) < prompt_length + STEPS:
            logits = run(backend, ids[-1:], first=len(ids) - 1)[0]
    # One pass over the finished text tells what transformers would have said at every step.
    said = transformers_logits(variant, ids[:-1])[prompt_length - 1 :].argmax(axis=1)
    assert ids[prompt_length:] == said.tolist()
