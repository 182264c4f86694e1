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
TOLERANCE = 1e-5
# A compiled backend takes seconds to build for each model: the rarest features of every family.
COMPILED = ("llama-bias", "mistral-window", "qwen2-window", "qwen3", "smollm3", "phi3-longrope")
CASES = [("reference", variant) for variant in VARIANTS] + [("cpu", v) for v in COMPILED]
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


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    """Shared by the tests, so that each kernel is compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def backend_of(checkpoint, cache_folder, monkeypatch):
    """`backend_of("cpu", "qwen3", context)` -> an open backend with that checkpoint's weights."""
    monkeypatch.setenv("FLASHFORMER_CACHE_DIR", str(cache_folder))
    opened = []

    def open_variant(device, variant, context=LENGTH):
        source = Checkpoint.open(checkpoint(variant))
        spec = ModelSpec.from_hf(source.config, source.generation_config)
        weights = CheckpointWeights(source, spec)
        options = PlanOptions(weights.dtype, weights.dtype, context, max_batch=1)
        opened.append(open_backend(device, spec, weights, options, num_pages=20, threads=2))
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


def assert_close(found, expected):
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize(("device", "variant"), CASES)
def test_the_logits_of_a_prompt_are_those_of_transformers(
    device, variant, backend_of, transformers_logits
):
    backend = backend_of(device, variant)
    ids = some_ids(backend, LENGTH)
    assert_close(run(backend, ids), transformers_logits(variant, ids))


@pytest.mark.parametrize("variant", ["llama-dynamic", "phi3-longrope"])
def test_a_short_context_uses_the_tables_of_a_short_context(
    variant, backend_of, transformers_logits
):
    backend = backend_of("reference", variant, SHORT)
    ids = some_ids(backend, SHORT)
    assert_close(run(backend, ids), transformers_logits(variant, ids))


@pytest.mark.parametrize(("device", "variant"), CASES)
def test_greedy_tokens_are_those_of_transformers_for_64_steps(
    device, variant, backend_of, transformers_logits
):
    # transformers grows the table of dynamic scaling while it decodes, here it is made for the
    # whole context: the two are the same model up to the original 64 positions only.
    prompt_length, context = (1, STEPS) if variant == "llama-dynamic" else (65, LENGTH)
    backend = backend_of(device, variant, context)
    ids = some_ids(backend, prompt_length)
    logits = run(backend, ids)[-1]
    for _ in range(STEPS):
        ids.append(int(logits.argmax()))
        if len(ids) < prompt_length + STEPS:
            logits = run(backend, ids[-1:], first=len(ids) - 1)[0]
    # One pass over the finished text tells what transformers would have said at every step.
    expected = transformers_logits(variant, ids[:-1])[prompt_length - 1 :].argmax(axis=1)
    assert ids[prompt_length:] == expected.tolist()
