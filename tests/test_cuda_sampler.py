"""The CUDA kernel's sampler, its threads run by a CPU, chooses what the numpy meaning chooses."""

import ctypes
import dataclasses

import numpy as np
import pytest
import torch

from flashformer.backends.base import NOT_A_NUMBER, NOT_FINITE, Choice
from flashformer.backends.cuda.choices import Choices, row_stride
from flashformer.backends.cuda.machine import Device, fit_machine
from flashformer.codegen.cuda_args import CudaStepArgs
from flashformer.codegen.exchange import exchange_bytes
from flashformer.engine.sampler import Draw, TokenCounts, sample
from flashformer.engine.sampling import SamplingParams
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.plan.plan import PlanOptions, make_plan
from simt_library import simt_library

VOCAB = 1003  # divides by nothing convenient
POSITION = 40


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    return Sampler(tmp_path_factory.mktemp("simt"))


class Sampler:
    """kernel/sample.cuh built by the C++ compiler, with the fibers of tests/simt for threads."""

    def __init__(self, folder):
        spec = ModelSpec.from_hf({**SHAPES["llama-3.2-1b"], "vocab_size": VOCAB})
        device = Device("three SMs", 9, 0, 3, 227 << 10, cooperative=True)
        self.plan = make_plan(spec, fit_machine(device, spec), PlanOptions(context=256))
        assert self.plan.machine.num_ctas == 3
        self.library = simt_library(folder, self.plan, "sampler")
        self.packet_bytes, self.exchange_bytes = exchange_bytes(self.plan)

    def draw(self, logits, choices, stop=0):
        """Tokens [steps, rows] for logits [steps, rows, VOCAB]."""
        steps, rows, _ = logits.shape
        kept = np.zeros((self.plan.machine.max_rows, row_stride(self.plan)), np.float32)
        exchange = np.zeros(self.exchange_bytes, np.uint8)
        barrier, stop_word = np.zeros(1, np.uint32), np.array([stop], np.uint32)
        out = np.full((steps, self.plan.machine.max_rows), -99, np.int32)
        args = CudaStepArgs()
        tables = Choices(self.plan, torch.device("cpu"))
        tables.fill(args, choices)
        args.num_rows, args.num_steps = rows, steps
        args.wait_limit_ns = 2**63
        args.logits, args.exchange = kept.ctypes.data, exchange.ctypes.data
        args.barrier, args.stop = barrier.ctypes.data, stop_word.ctypes.data
        args.out_tokens = out.ctypes.data
        for row in range(rows):
            args.positions[row] = POSITION + row
        logits = np.ascontiguousarray(logits, np.float32)
        self.library.draw(ctypes.byref(args), logits.ctypes.data_as(ctypes.c_void_p))
        return out[:, :rows]


def choice_of(params, counts, seed, index, stop_ids=(), min_tokens=0):
    return Choice(
        temperature=0.0 if params.greedy else params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        counts=counts,
        bias=params.logit_bias or {},
        allowed_ids=params.allowed_token_ids,
        seed=seed,
        index=index,
        stop_ids=stop_ids,
        min_tokens=min_tokens,
    )


def by_definition(logits, params, prompt, seed, index, row, stop_ids=(), min_tokens=0):
    counts, tokens = TokenCounts(prompt), []
    for step, values in enumerate(logits):
        forbidden = stop_ids if step < min_tokens else ()
        draw = Draw(seed, POSITION + row + step + 1, index)
        tokens.append(sample(values, params, draw, counts, forbidden))
        counts.add(max(tokens[-1], 0))
    return tokens


def random_params(rng):
    pick = rng.choice
    return SamplingParams(
        temperature=float(pick([0.0, 0.3, 0.7, 1.0, 1.5, 20.0])),
        top_k=int(pick([0, 0, 1, 5, 40, 700])),
        top_p=float(pick([1.0, 1.0, 0.95, 0.5, 0.999, 1e-6])),
        min_p=float(pick([0.0, 0.0, 0.05, 0.5])),
        repetition_penalty=float(pick([1.0, 1.3, 0.7])),
        frequency_penalty=float(pick([0.0, 0.5])),
        presence_penalty=float(pick([0.0, -0.4])),
        logit_bias={int(i): float(rng.normal() * 5) for i in rng.integers(0, VOCAB, 9)}
        if rng.random() < 0.3
        else None,
        allowed_token_ids=[int(i) for i in rng.integers(0, VOCAB, 60)]
        if rng.random() < 0.2
        else None,
    )


@pytest.mark.parametrize("trial", range(12))
def test_rows_of_any_kind_choose_side_by_side_what_the_definition_chooses(sampler, trial):
    """Scores of float32 against float64: two of them are never closer than its rounding here."""
    rng = np.random.default_rng(trial)
    steps, rows = 12, int(rng.choice([1, 3, 8]))
    spread = rng.choice([0.5, 3.0, 12.0], rows)[:, None]
    logits = (rng.standard_normal((steps, rows, VOCAB)) * spread).astype(np.float32)
    if trial % 3 == 0:
        logits = np.round(logits)  # many ties
    kinds = [random_params(rng) for _ in range(rows)]
    prompts = [rng.integers(0, VOCAB, 30).tolist() for _ in range(rows)]
    seeds = [int(seed) for seed in rng.integers(0, 2**63, rows)]

    choices = [
        choice_of(params, dict.fromkeys(prompt, 0), seed, row % 2)
        for row, (params, prompt, seed) in enumerate(zip(kinds, prompts, seeds, strict=True))
    ]
    found = sampler.draw(logits, choices)

    for row in range(rows):
        expected = by_definition(logits[:, row], kinds[row], prompts[row], seeds[row], row % 2, row)
        assert found[:, row].tolist() == expected, kinds[row]


def test_all_tokens_equal_are_told_apart_by_their_ids(sampler):
    logits = np.zeros((40, 2, VOCAB), np.float32)
    kinds = [SamplingParams(top_k=7), SamplingParams(top_p=0.25)]
    found = sampler.draw(logits, [choice_of(p, {}, 1, 0) for p in kinds])

    for row, params in enumerate(kinds):
        assert found[:, row].tolist() == by_definition(logits[:, row], params, [], 1, 0, row)
    assert found[:, 0].max() < 7


def test_a_stop_id_ends_the_launch_for_all_rows_at_the_same_token(sampler):
    logits = np.zeros((9, 2, VOCAB), np.float32)
    logits[:, 0, 5] = 1
    logits[4, 1, 17] = 1  # by greedy rows 17 is drawn at step 4
    rows = [Choice(stop_ids=(17,)), Choice(stop_ids=(900, 17))]
    found = sampler.draw(logits, rows)

    assert found[:5, 0].tolist() == [5] * 5
    assert found[:5, 1].tolist() == [0, 0, 0, 0, 17]
    assert (found[5:] == -99).all()


def test_stop_ids_are_forbidden_in_the_first_tokens(sampler):
    logits = np.zeros((6, 1, VOCAB), np.float32)
    logits[:, 0, [3, 1002]] = 2, 1
    found = sampler.draw(logits, [Choice(stop_ids=(3, 1002), min_tokens=4)])

    assert found[:, 0].tolist() == [0, 0, 0, 0, 3, -99]


def test_the_host_s_word_ends_the_launch(sampler):
    found = sampler.draw(np.zeros((6, 1, VOCAB), np.float32), [Choice()], stop=1)

    assert found[:, 0].tolist() == [0] + [-99] * 5


@pytest.mark.parametrize(
    "choice", [Choice(), Choice(temperature=1.0), Choice(temperature=1.0, top_k=3)]
)
def test_logits_that_are_not_finite_end_the_launch_with_a_reason(sampler, choice):
    good = np.random.default_rng(0).standard_normal((3, 2, VOCAB)).astype(np.float32)
    for value, reason in ((np.nan, NOT_A_NUMBER), (np.inf, NOT_FINITE)):
        logits = good.copy()
        logits[1, 0, 700] = value
        found = sampler.draw(logits, [choice, dataclasses.replace(choice, seed=4)])
        assert found[1, 0] == reason
        assert (found[:2, 1] >= 0).all()
        assert (found[2] == -99).all()
    found = sampler.draw(np.full((2, 1, VOCAB), -np.inf, np.float32), [choice])
    assert found[:, 0].tolist() == [NOT_FINITE, -99]


def test_repeats_have_the_same_tokens(sampler):
    logits = np.random.default_rng(5).standard_normal((8, 4, VOCAB)).astype(np.float32)
    choices = [Choice(temperature=1.0, top_p=0.9, top_k=50, seed=i) for i in range(4)]
    together = sampler.draw(logits, choices)

    assert np.array_equal(sampler.draw(logits, choices), together)
