"""The checkpoint that the start is measured with is one that loads, and limits are limits."""

import pytest

import startup
from flashformer.model.checkpoint import Checkpoint
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import CheckpointWeights

TINY = {
    "model_type": "qwen3",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "vocab_size": 400,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def test_the_checkpoint_has_every_tensor_of_its_shape(tmp_path, monkeypatch):
    monkeypatch.setitem(startup.SHAPES, "tiny", TINY)
    nbytes = startup.write_checkpoint(tmp_path / "checkpoint", "tiny")
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    weights = CheckpointWeights(checkpoint, ModelSpec.from_hf(checkpoint.config))
    assert weights.dtype == "bf16"
    assert nbytes == sum(2 * checkpoint.tensor(name).size for name in checkpoint.names)


@pytest.mark.parametrize(("compile_known", "passed"), [(0.5, True), (1.5, False)])
def test_the_known_model_counts_by_its_median(compile_known, passed):
    new = {"parts_s": {"compiling": 12.0}, "load_s": 90.0}
    known = [
        {"parts_s": {"compiling": seconds}, "load_s": 6.0, "process_s": 9.0}
        for seconds in (0.1, compile_known, 9.0)
    ]
    found = startup.summary([new, *known])
    assert found["passed"] is passed
    assert found["seconds"]["compile_known"] == compile_known
