"""The CUDA decoder on a CPU: `CudaBackend.decode` for the libraries of tests/simt/decode.cpp."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch

from flashformer.backends.base import Choice, StepResult
from flashformer.backends.cuda.backend import MAX_SLOTS
from flashformer.backends.cuda.choices import Choices, row_stride
from flashformer.backends.cuda.flight import UNWRITTEN
from flashformer.backends.cuda.geometry import activation_bytes, copies_in_flight
from flashformer.backends.cuda.kv_pages import Pages, load_pages
from flashformer.backends.cuda.memory import past_bytes_per_token
from flashformer.codegen.cuda_args import CudaStepArgs
from flashformer.codegen.cuda_header import slot_bytes
from flashformer.codegen.exchange import exchange_bytes, find_buffer, padded, read_buffer
from simt_library import simt_library

FIXED_BYTES = 16384  # of shared memory: `Shared` of kernel/cta.cuh has no more
WAIT_LIMIT = 30_000_000  # turns of fibers: ten times a launch


@dataclass
class Launched:
    """What a launch has left."""

    tokens: np.ndarray  # int32 [num_steps, rows]
    logits: np.ndarray  # float32 [rows, vocab_size], of the last step
    turns: int  # of fibers
    barriers: int  # that the CTAs have met at, modulo two


class EmulatedDecoder:
    """A library for each of some row classes, in rising order."""

    def __init__(self, folder, plan, image, num_pages, classes):
        self.plan, self.image, self.num_pages = plan, image, num_pages
        rows = plan.machine.max_rows
        past_bytes = num_pages * plan.machine.page_tokens * past_bytes_per_token(plan)
        values = np.random.default_rng(5).standard_normal(past_bytes // 2, np.float32)
        self.random_past = values.astype(ml_dtypes.bfloat16).view(np.uint8)
        self.kv = self.random_past.copy()
        self.exchange = np.zeros(exchange_bytes(plan)[1], np.uint8)
        self.kept = np.zeros((rows, row_stride(plan)), np.float32)
        self.choices = Choices(plan, torch.device("cpu"))

        def build(rows):
            (folder / str(rows)).mkdir()
            return simt_library(folder / str(rows), plan, "decode", rows)

        with ThreadPoolExecutor(2) as pool:
            self.libraries = dict(zip(classes, pool.map(build, classes), strict=True))
        for library in self.libraries.values():
            library.emulate.argtypes = (
                ctypes.c_void_p,
                ctypes.c_uint32,
                ctypes.c_uint64,
                ctypes.c_uint32,
            )
            library.emulate.restype = ctypes.c_uint64

    def reset_past(self):
        """All pages with random keys and values, the same every time."""
        self.kv[:] = self.random_past

    def past(self, layer, pages, num_tokens):
        """What the pages of a sequence hold: (key, 0, value) of every position, for an oracle."""
        spec, tokens = self.plan.spec, self.plan.machine.page_tokens
        record = spec.layers[layer]
        stored = self.kv.view(np.int16).reshape(spec.num_layers, self.num_pages, -1)[layer]
        shape = (self.num_pages, record.num_kv_heads, 2, tokens * padded(record.head_dim))
        found = Pages(torch.from_numpy(stored.reshape(shape)), torch.from_numpy(pages).long())
        parts = torch.empty(
            2, len(pages) * tokens, shape[1], padded(record.head_dim), dtype=torch.int16
        )
        load_pages(found, *parts)
        keys, values = (
            parts.numpy().view(ml_dtypes.bfloat16).astype(np.float64)[..., : record.head_dim]
        )
        return [(keys[i], np.zeros_like(keys[i]), values[i]) for i in range(num_tokens)]

    def launch(
        self,
        token_ids,
        positions,
        slots,
        page_table,
        num_steps,
        stop_after=0,
        stop_at=0,
        firm_steps=0,
        seed=1,
        lost_bits=0,
        num_slots=MAX_SLOTS,
    ):
        """`stop_at`: the turn at which the host sets the stop word. `seed`: of who takes turns.
        `lost_bits`: of the tensor cores' float32 sums. `num_slots`: of the ring, if they fit."""
        rows, machine = len(token_ids), self.plan.machine
        table = np.ascontiguousarray(page_table, np.int32)
        out = np.full((num_steps, machine.max_rows), UNWRITTEN, np.int32)
        barrier, abandon, watchdog, stop = (np.zeros(1, np.uint32) for _ in range(4))
        args = CudaStepArgs()
        places = {
            "image": self.image, "kv": self.kv, "exchange": self.exchange, "logits": self.kept,
            "page_table": table, "out_tokens": out, "stop": stop, "abandon": abandon,
            "barrier": barrier, "watchdog": watchdog,
        }  # fmt: skip
        for name, array in places.items():
            setattr(args, name, array.ctypes.data)
        most = next(most for most in self.libraries if most >= rows)
        slot = slot_bytes(self.plan)
        args.x_bytes = activation_bytes(self.plan, most)
        room = machine.shared_bytes - FIXED_BYTES - args.x_bytes
        args.num_slots = min(num_slots, room // slot)
        in_flight = copies_in_flight(self.plan, most, args.num_slots)
        args.in_flight, args.full_in_flight = in_flight
        args.num_rows, args.num_pages, args.max_pages = rows, self.num_pages, table.shape[1]
        args.num_steps, args.stop_after, args.firm_steps = num_steps, stop_after, firm_steps
        args.kept_rows, args.epoch, args.wait_limit_ns = (1 << rows) - 1, 1, WAIT_LIMIT
        for i, (token_id, position, slot) in enumerate(
            zip(token_ids, positions, slots, strict=True)
        ):
            same = i > 0 and slot == slots[i - 1]
            args.tokens[i], args.positions[i], args.slots[i] = token_id, position, slot
            args.bases[i] = args.bases[i - 1] if same else position
        self.choices.fill(args, [Choice()] * rows)
        self.exchange[:] = 255
        turns = self.libraries[most].emulate(ctypes.addressof(args), seed, stop_at, lost_bits)
        assert watchdog[0] == 0, hex(watchdog[0])
        assert barrier[0] in (0, 1 << 31)
        logits = self.kept[:rows, : self.plan.spec.vocab_size].copy()
        return Launched(out[:, :rows], logits, turns, int(barrier[0] >> 31))

    # What `stage_oracle.Watched` wants of a backend.

    def decode(self, token_ids, positions, slots, page_table, num_steps, stop_after=0):
        return self.launch(token_ids, positions, slots, page_table, num_steps, stop_after).tokens

    def step(self, batch):
        found = self.launch(
            batch.token_ids, batch.positions, batch.slots, batch.page_table, num_steps=1
        )
        return StepResult(found.logits, found.tokens[0])

    def exchange_buffer(self, name):
        at, buffer = find_buffer(self.plan, name)
        return read_buffer(self.plan, buffer, self.exchange[at:])
