"""How the rows of a launch choose their tokens: `Choice`s -> arguments and tables of the kernel."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flashformer.backends.base import Choice
from flashformer.codegen.cuda_args import MAX_STOP_IDS
from flashformer.plan.plan import Plan
from flashformer.quant.formats import TILE_ROWS

IN_PROMPT = 1 << 31  # in_prompt of kernel/adjust.cuh
NUM_BUCKETS = 512  # num_buckets of kernel/order.cuh
HOPELESS = -26.03  # _HOPELESS of engine/sampler.py
BUCKET_BYTES = 16
BUCKET_SETS = 3


def row_stride(plan: Plan) -> int:
    """Tokens from one row of logits to the next: whole tiles."""
    return -(-plan.spec.vocab_size // TILE_ROWS) * TILE_ROWS


def choice_bytes(plan: Plan) -> int:
    """GPU memory of the tables."""
    rows = plan.machine.max_rows
    return rows * (3 * 4 * row_stride(plan) + BUCKET_SETS * NUM_BUCKETS * BUCKET_BYTES)


class Choices:
    """The tables of one kernel on the GPU, a row of each for every row of a launch."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        rows, self._vocab_size = plan.machine.max_rows, plan.spec.vocab_size
        self._device = device
        shape = (rows, row_stride(plan))
        self._adjusted = torch.zeros(shape, dtype=torch.float32, device=device)
        self._bias = torch.zeros(shape, dtype=torch.float32, device=device)
        self._counts = torch.zeros(shape, dtype=torch.int32, device=device)
        buckets = BUCKET_SETS * rows * NUM_BUCKETS * BUCKET_BYTES
        self._buckets = torch.zeros(buckets, dtype=torch.uint8, device=device)

    def fill(self, args: Any, choices: Sequence[Choice]) -> None:
        """Set the arguments of the rows, and the tables of those that need them."""
        args.adjusted, args.bias = self._adjusted.data_ptr(), self._bias.data_ptr()
        args.counts, args.buckets = self._counts.data_ptr(), self._buckets.data_ptr()
        for row, choice in enumerate(choices):
            self._fill_row(args, row, choice)
        args.sampled_rows |= args.adjusted_rows
        args.kept_rows |= args.sampled_rows
        if args.filtered_rows:
            self._buckets.zero_()

    def _fill_row(self, args: Any, row: int, choice: Choice) -> None:
        bit = 1 << row
        args.seeds[row], args.indices[row] = choice.seed, choice.index
        args.temperature[row] = choice.temperature
        args.num_stop_ids[row] = len(choice.stop_ids)
        first = row * MAX_STOP_IDS
        args.stop_ids[first : first + len(choice.stop_ids)] = choice.stop_ids
        args.min_steps[row] = choice.min_tokens
        if choice.temperature > 0:
            args.sampled_rows |= bit
            self._fill_filter(args, row, choice)
        if choice.biased:
            args.biased_rows |= bit
            self._fill_bias(row, choice)
        if choice.penalised:
            args.penalised_rows |= bit
            args.repetition_penalty[row] = choice.repetition_penalty
            args.frequency_penalty[row] = choice.frequency_penalty
            args.presence_penalty[row] = choice.presence_penalty
            self._fill_counts(row, choice)
        if choice.biased or choice.penalised or choice.min_tokens > 0:
            args.adjusted_rows |= bit

    def _fill_filter(self, args: Any, row: int, choice: Choice) -> None:
        top_k = choice.top_k if choice.top_k < self._vocab_size else 0
        args.top_k[row] = top_k
        args.top_p[row] = int(choice.top_p * 2**64) if choice.top_p < 1 else 0
        least = np.float32(np.log(choice.min_p)) if choice.min_p > 0 else -np.inf
        args.floors[row] = max(np.float32(HOPELESS), least)
        if top_k or choice.top_p < 1 or choice.min_p > 0:
            args.filtered_rows |= 1 << row

    def _fill_bias(self, row: int, choice: Choice) -> None:
        bias = np.zeros(self._bias.shape[1], np.float32)
        bias[list(choice.bias)] = list(choice.bias.values())
        if choice.allowed_ids is not None:
            masked = np.full_like(bias, -np.inf)
            allowed = list(choice.allowed_ids)
            masked[allowed] = bias[allowed]
            bias = masked
        self._bias[row] = torch.as_tensor(bias).to(self._device)

    def _fill_counts(self, row: int, choice: Choice) -> None:
        counts = np.zeros(self._counts.shape[1], np.uint32)
        values = np.fromiter(choice.counts.values(), np.uint32, len(choice.counts))
        counts[list(choice.counts)] = values + np.uint32(IN_PROMPT)
        self._counts[row] = torch.as_tensor(counts.view(np.int32)).to(self._device)
