"""`flashformer eval`: torch finds the same perplexity, and rounding explains a format's cost."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashformer import LLM
from flashformer.codegen.cache import cache_dir
from flashformer.engine.likelihood import measure_likelihood
from flashformer.model.default import HELD_OUT, default_checkpoint
from flashformer.model.weights import CheckpointWeights, as_float32
from flashformer.quant.decode import decode
from flashformer.quant.encode import encode
from flashformer.quant.formats import FORMATS

TEXT = HELD_OUT.read_text()[:6000]
WINDOW = 200
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def likelihoods():
    """The embedded model's, by weight format."""
    found = {}
    for quant in (None, "int8", "int4"):
        with LLM(device="reference", quant=quant, max_batch=1, context=WINDOW) as llm:
            found[quant] = measure_likelihood(llm, TEXT, WINDOW)
    return found


def test_the_likelihood_of_a_text_is_that_of_transformers(likelihoods):
    folder = default_checkpoint(cache_dir())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    losses = []
    for start in range(0, len(ids), WINDOW - 1):
        piece = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + WINDOW - 1]]])
        with torch.no_grad():
            logits = model(piece).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="none"))
    found = likelihoods[None]
    assert found.num_bytes == len(TEXT.encode())
    # float32 on both sides: a loss differs by a few roundings of logits of size 30, 30 * 2^-23 each
    np.testing.assert_allclose(found.losses, torch.cat(losses).numpy(), atol=1e-3)
    assert found.perplexity == pytest.approx(math.exp(found.losses.mean()))
    assert found.bits_per_byte == pytest.approx(found.losses.sum() / math.log(2) / len(TEXT))


def test_int8_costs_no_more_than_its_rounding_explains(likelihoods):
    """The loss rises by half the variance of the logits' error, plus chance.

    Every product adds the relative error of its own weights to that of its input, independent of
    it, and norms keep relative errors: the logits' relative error, squared, is at most the sum of
    those of all matrices on the way. Errors that do not depend on the target have no first-order
    effect on the mean loss but chance: std sqrt(variance / tokens), of which three are allowed.
    """
    with LLM(device="reference", max_batch=1, context=WINDOW) as llm:
        weights = CheckpointWeights(llm.checkpoint, llm.spec)
        layers = [(role, i) for i in range(len(llm.spec.layers)) for role in MATRICES]
        squared_error = sum(relative_error(weights, *at) for at in [*layers, ("lm_head", -1)])
        logits = llm.logits(llm.tokenizer.encode(TEXT)[:WINDOW])
    variance = squared_error * float(logits.var(axis=1).mean())
    tokens = len(likelihoods[None].losses)
    bound = variance / 2 + 3 * math.sqrt(variance / tokens)
    cost = likelihoods["int8"].nats_per_token - likelihoods[None].nats_per_token
    assert abs(cost) < bound
    assert bound < 0.05, "a bound that would let int4 pass says nothing"
    assert likelihoods["int4"].nats_per_token - likelihoods[None].nats_per_token > bound


def relative_error(weights, role, layer):
    """Mean square of a matrix's rounding error in int8, relative to that of its values."""
    values = as_float32(weights.tensor(role, layer))
    rounded = decode(encode(values, FORMATS["int8"]), FORMATS["int8"])
    return float(np.square(rounded - values).mean() / np.square(values).mean())


def test_eval_prints_a_row_for_every_format(cli, tmp_path):
    (tmp_path / "text").write_text(TEXT[:1500])
    ended = cli("eval", "--text", tmp_path / "text", "--window", 64, "--device", "reference")
    assert ended.code == 0
    assert [line.split()[0] for line in ended.out.splitlines()] == [
        "format", "bf16", "int8", "int4", "int4g128",
    ]  # fmt: skip


def test_eval_json_has_what_a_result_file_needs(cli, tmp_path):
    (tmp_path / "text").write_text(TEXT[:800])
    given = ("--text", tmp_path / "text", "--window", 64, "--device", "reference", "--json")
    found = cli("eval", *given, "--quant", "stored,int8").json
    assert found["kind"] == "quality"
    assert [row["format"] for row in found["formats"]] == ["bf16", "int8"]
    assert found["formats"][0]["same_choice"] == 1.0
    assert found["text"]["bytes"] == 800
    assert {"machine", "versions", "git", "date", "command"} <= found.keys()


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--quant", "int8,int3"], "int3"),
        (["--quant", ""], "--quant takes"),
        (["--text", "missing.txt"], "missing.txt cannot be read"),
        (["--text", "bytes"], "no UTF-8"),
        (["--text", "empty", "--device", "reference"], "empty"),
        (["--window", "5000", "--device", "reference"], "context"),
    ],
)
def test_wrong_use_of_eval_is_one_sentence(cli, tmp_path, monkeypatch, flags, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").write_text("")
    assert match in cli("eval", *flags).error(2)
