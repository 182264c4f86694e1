"""What the sanitizers watch: two layers, the persistent kernel included, in a few small steps.

python benchmarks/sanitized_run.py -> one line, the sha256 of all tokens and logits
    --every-lane-arrives: for racecheck, which does not see that one lane speaks for its warp
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from flashformer.backends.cuda import CudaBackend, cuda_machine
from flashformer.codegen.instruments import Instruments
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import RandomWeights
from flashformer.plan.pack import pack
from flashformer.plan.plan import Plan, PlanOptions, make_plan

CONTEXT = 384
BATCHES = (1, 2, 8)
STEPS = 2
PROMPT = 12
PROMPT_SLOTS = (0, 7)
LONG = 300  # a position with several chunks before it: pages of zeros, mostly
ROWS = 8
WAIT_LIMIT_NS = 300_000_000_000  # a watched kernel is a hundred times slower
SHAPE = {
    "hidden_size": 328,
    "intermediate_size": 712,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 519,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": CONTEXT,
    "hidden_act": "silu",
}
# QK-norm in bf16; biases and a tied head; a window in fp16
MODELS = {
    "qwen3": ({"tie_word_embeddings": False}, "bf16"),
    "qwen2": ({"tie_word_embeddings": True}, "bf16"),
    "mistral": ({"tie_word_embeddings": False, "sliding_window": 17}, "f16"),
}


def main() -> None:
    """Run all models and batches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every-lane-arrives", action="store_true")
    instruments = Instruments(every_lane_arrives=parser.parse_args().every_lane_arrives)
    digest = hashlib.sha256()
    started = time.perf_counter()
    for model_type, (changes, weight_format) in MODELS.items():
        spec = ModelSpec.from_hf({"model_type": model_type, **SHAPE, **changes})
        options = PlanOptions(weight_format, weight_format, CONTEXT, max(BATCHES))
        plan = make_plan(spec, cuda_machine(spec), options)
        image = np.zeros(plan.image_bytes, np.uint8)
        pack(plan, RandomWeights(spec), image)
        for found in results(plan, image, instruments):
            digest.update(found.tobytes())
            spent = time.perf_counter() - started
            print(f"{model_type} {spent:.1f} s", file=sys.stderr, flush=True)
    sys.stdout.write(digest.hexdigest() + "\n")


def results(
    plan: Plan, image: npt.NDArray[np.uint8], instruments: Instruments
) -> Iterator[npt.NDArray[Any]]:
    """Logits of a prompt in two slots, eight tokens a launch; then tokens of every batch.

    Prompts go through the decoder, not through torch: its libraries are not what is watched.
    """
    pages = -(-CONTEXT // plan.machine.page_tokens)
    table = np.arange(max(BATCHES) * pages, dtype=np.int32).reshape(max(BATCHES), pages)
    backend = CudaBackend(plan, image, table.size, instruments)
    backend.wait_limit_ns = WAIT_LIMIT_NS
    ids = np.random.default_rng(0).integers(0, plan.spec.vocab_size, PROMPT).astype(np.int32)
    positions = np.arange(PROMPT, dtype=np.int32)
    for slot in PROMPT_SLOTS:
        for first in range(0, PROMPT, ROWS):
            part = slice(first, first + ROWS)
            slots = np.full(len(ids[part]), slot, np.int32)
            yield backend.decode(ids[part], positions[part], slots, table, 1)
            yield backend.logits[: len(slots)].cpu().numpy()
    for batch in BATCHES:
        rows = np.arange(batch, dtype=np.int32)
        start = np.where(rows % 2, LONG, PROMPT).astype(np.int32)
        yield backend.decode(ids[:batch].copy(), start, rows, table, STEPS)
    backend.close()


if __name__ == "__main__":
    main()
