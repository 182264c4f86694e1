"""8 and 4 bits a weight on a GPU: as close to the weights' meaning as 16-bit arithmetic, and the
same bits at any batch. Each stage alone is in test_cuda_stages.py."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flashformer.backends import open_backend
from flashformer.model.checkpoint import Checkpoint
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import CheckpointWeights
from flashformer.plan.plan import PlanOptions
from flashformer.quant.decode import decode
from flashformer.quant.encode import encode
from flashformer.quant.formats import FORMATS, QUANTS, head_format
from test_cuda import BATCH, LENGTH, decode_rows, divergence, forward, head_dim
from test_cuda import VARIANTS as ALL

pytestmark = pytest.mark.gpu

VARIANT = next(v for v in ALL if head_dim(v) % 8 == 0)


@pytest.fixture
def opened(checkpoint):
    backends = []

    def open_narrow(name):
        source = Checkpoint.open(checkpoint(VARIANT))
        spec = ModelSpec.from_hf(source.config, source.generation_config)
        options = PlanOptions(name, head_format(name, "cuda"), LENGTH, max_batch=BATCH)
        pages = BATCH * (LENGTH // 16 + 1)
        weights = CheckpointWeights(source, spec)
        backends.append(open_backend("cuda", spec, weights, options, num_pages=pages))
        return backends[-1]

    yield open_narrow
    for backend in backends:
        backend.close()


def logits_of_meaning(folder, ids, name, dtype):
    """Logits of transformers with the weights that the codes stand for, rounded to `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for place, weights in model.named_parameters():
            if weights.ndim == 2:
                whole = "embed_tokens" in place or "lm_head" in place
                weight_format = FORMATS[head_format(name, "cuda") if whole else name]
                meaning = decode(encode(weights.numpy(), weight_format), weight_format)
                weights.copy_(torch.from_numpy(meaning))
        model = model.to("cuda", dtype)
        return model(torch.tensor(ids, device="cuda")[None]).logits[0].float().cpu().numpy()


@pytest.mark.parametrize("rows", [1, BATCH, LENGTH], ids=["alone", "by eight", "as a prompt"])
@pytest.mark.parametrize("name", QUANTS)
def test_logits_are_as_close_to_the_codes_meaning_as_those_of_bf16(checkpoint, opened, name, rows):
    backend = opened(name)
    ids = np.random.default_rng(1).integers(0, backend.plan.spec.vocab_size, LENGTH)
    exact = logits_of_meaning(checkpoint(VARIANT), ids, name, torch.float32)
    rounded = divergence(logits_of_meaning(checkpoint(VARIANT), ids, name, torch.bfloat16), exact)

    assert divergence(forward(backend, ids, rows=rows), exact) <= 1.05 * rounded


@pytest.mark.parametrize("name", ["int8", "fp8", "int4g128", "int4z"])
def test_a_row_of_a_batch_has_the_bits_of_the_same_row_alone(opened, name):
    backend = opened(name)
    for slot in range(BATCH):
        ids = np.random.default_rng(slot).integers(0, backend.plan.spec.vocab_size, 100)
        forward(backend, ids, slot)
    together = decode_rows(backend, [5] * BATCH, [100] * BATCH, range(BATCH)).logits

    for count in (1, 2, 3):
        for slot in range(0, BATCH, count):
            slots = range(slot, min(BATCH, slot + count))
            few = decode_rows(backend, [5] * len(slots), [100] * len(slots), slots).logits
            assert np.array_equal(few, together[slots.start : slots.stop])
