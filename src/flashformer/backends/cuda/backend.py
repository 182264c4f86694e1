"""The decoder on one GPU: everything in its memory, one launch for many tokens."""

import contextlib
import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cuda.bindings import driver

from flashformer.backends.base import DecodeRow, Int32, StepBatch, StepResult
from flashformer.backends.cuda.choices import Choices, row_stride
from flashformer.backends.cuda.compile import Cubin, compile_kernel
from flashformer.backends.cuda.flight import Flight
from flashformer.backends.cuda.geometry import Ring, activation_bytes, copies_in_flight
from flashformer.backends.cuda.launch import Kernel, check
from flashformer.backends.cuda.machine import MIN_SLOTS, ROW_CLASSES, row_classes
from flashformer.backends.cuda.memory import past_bytes_per_token
from flashformer.backends.cuda.prefill import Prefill
from flashformer.backends.cuda.watchdog import describe
from flashformer.codegen.cuda_args import MAX_STOP_IDS, CudaStepArgs
from flashformer.codegen.cuda_header import slot_bytes
from flashformer.codegen.exchange import exchange_bytes, find_buffer, read_buffer
from flashformer.codegen.instruments import NONE, TRACKS, Instruments
from flashformer.errors import FlashFormerError, OutOfMemoryError
from flashformer.plan.pack import Progress
from flashformer.plan.plan import Plan

NUM_WARPS = 10  # eight consumers, the finisher, the producer
MAX_SLOTS = 24  # of the ring: kernel/cta.cuh
NO_EPOCH = 0xFFFFFFFF  # what poisoned buffers hold
MOVED_BYTES = 1 << 28  # to the GPU at once, between two words to whoever waits
PREFILL_PASSES = 3  # over the weights by `Prefill`: it reads the image, writes the slab, reads it


class CudaBackend:
    """Runs a plan on the current CUDA device. Not thread-safe.

    For tests: `wait_limit_ns`, after which a wait in the kernel gives up; `in_flight`, the copies
    on their way to a CTA, and while half of its slots wait to be read; `delay_seed` and `drop`
    (matrix from 1, CTA), which a kernel built with those instruments obeys.
    """

    max_stop_ids = MAX_STOP_IDS
    wait_limit_ns = 2_000_000_000
    in_flight: tuple[int, int] | None = None
    delay_seed = 0
    drop = (0, 0)

    def __init__(
        self,
        plan: Plan,
        image: npt.NDArray[np.uint8] | torch.Tensor,
        num_pages: int,
        instruments: Instruments = NONE,
        progress: Progress | None = None,
    ) -> None:
        """`image` [plan.image_bytes] in host or device memory; it is not kept if it is the host's.

        `progress` hears of compiling and of moving the image to the GPU, see `pack`. With
        `instruments.trace_moments` the last launch's timeline lies in `trace`.
        """
        self._plan = plan
        self._num_pages = num_pages
        self._device = torch.device("cuda", 0)
        self._stream = torch.cuda.current_stream(self._device)  # makes the context current
        self._instruments = instruments
        self._progress = progress or (lambda *_: None)
        self._kernels = self._load_decoders()
        self._rings = {rows: self._ring(rows) for rows in self._kernels}
        rows, machine = plan.machine.max_rows, plan.machine
        self._packet_bytes, all_bytes = exchange_bytes(plan)
        self._image = self._moved(image)
        self._kv = self._zeros(num_pages * machine.page_tokens * past_bytes_per_token(plan))
        self._exchange = self._zeros(all_bytes)
        self.epoch = 1  # of the next launch's first layer: what is left of earlier ones is older
        self._logits = self._zeros((rows, row_stride(plan)), torch.float32)
        self._choices = Choices(plan, self._device)
        self._flight: Flight | None = None
        self._in_vain = False  # the last one of many tokens has drawn nothing
        counter = torch.tensor([instruments.counter_start], device=self._device)
        self._barrier = counter.to(torch.int32)
        self._abandon = self._zeros(1, torch.int32)
        self._watchdog = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        moments = (machine.num_ctas, len(TRACKS), max(1, instruments.trace_moments), 2)
        self.trace = self._zeros(moments, torch.int64)
        self._page_table = torch.zeros(0, dtype=torch.int32, device=self._device)
        self._known_pages: Int32 | None = None
        self._prefill = Prefill(plan, self._image, self._kv)
        self._clear_pages()

    def warm_up(self) -> None:
        """Run a few prompts, so that no user's waits for torch's kernels; the pages are cleared."""
        self._prefill.warm_up(self._num_pages)
        self._clear_pages()

    def _clear_pages(self) -> None:
        self._kv.fill_(255 if self._instruments.poison else 0)  # NaN in tests

    @property
    def plan(self) -> Plan:
        """The plan it runs."""
        return self._plan

    @property
    def num_pages(self) -> int:
        """KV pages that exist."""
        return self._num_pages

    @property
    def logits(self) -> torch.Tensor:
        """Of the last launch's last step, on the GPU: float32 [max_rows, vocab_size]."""
        return self._logits[:, : self._plan.spec.vocab_size]

    def step(self, batch: StepBatch) -> StepResult:
        """Run the rows through the model: `max_rows` a launch, prompts through `Prefill`.

        A few launches pass over the weights as often as `Prefill` does, so it gets what needs more.
        """
        self._land()
        most = self._plan.machine.max_rows
        wanted = len(batch.logit_rows)
        logits = np.empty((wanted, self._plan.spec.vocab_size), np.float32)
        result = StepResult(logits, np.empty(wanted, np.int32))
        starts = np.flatnonzero(np.diff(batch.slots, prepend=-1))
        runs = np.split(np.arange(len(batch.slots)), starts[1:])  # rows of one sequence each
        for rows in runs:
            if len(rows) > PREFILL_PASSES * most:
                self._run_prompt(batch, rows, result)
        short = [rows for rows in runs if len(rows) <= PREFILL_PASSES * most]
        few = np.concatenate(short or [starts[:0]])
        for first in range(0, len(few), most):
            self._run_rows(batch, few[first : first + most], result)
        return result

    def _run_prompt(self, batch: StepBatch, rows: npt.NDArray[np.intp], result: StepResult) -> None:
        self._upload(batch.page_table)
        here = np.isin(batch.logit_rows, rows)
        logits = self._prefill.prompt(
            batch.token_ids[rows],
            int(batch.positions[rows[0]]),
            self._page_table[int(batch.slots[rows[0]])].long(),
            batch.logit_rows[here] - rows[0].astype(np.int32),
        )
        best = logits.argmax(axis=1)  # the first of equals, or the first NaN
        result.logits[here] = logits
        result.argmax[here] = np.where(np.isnan(logits[np.arange(len(best)), best]), -1, best)

    def _run_rows(self, batch: StepBatch, rows: npt.NDArray[np.intp], result: StepResult) -> None:
        tokens = self.decode(
            batch.token_ids[rows],
            batch.positions[rows],
            batch.slots[rows],
            batch.page_table,
            num_steps=1,
        )
        here = np.isin(batch.logit_rows, rows)
        if here.any():
            wanted = np.searchsorted(rows, batch.logit_rows[here])
            picked = torch.as_tensor(wanted, device=self._device)
            result.logits[here] = self.logits[picked].cpu().numpy()
            result.argmax[here] = tokens[0, wanted]

    def decode(
        self,
        token_ids: Int32,
        positions: Int32,
        slots: Int32,
        page_table: Int32,
        num_steps: int,
        stop_after: int = 0,
    ) -> Int32:
        """Greedy tokens of up to `max_rows` rows in one launch: int32 [num_steps, rows].

        Rows of one sequence are consecutive, in order of position; more than one a sequence only
        with num_steps = 1. `stop_after` ends the step after so many matrices (0: never) and leaves
        the buffers to be looked at. Raises `FlashFormerError` when a wait in the kernel timed out;
        the backend stays usable.
        """
        rows = [
            DecodeRow(int(token_id), int(position), int(slot))
            for token_id, position, slot in zip(token_ids, positions, slots, strict=True)
        ]
        flight = self._depart(rows, page_table, num_steps, stop_after=stop_after, keep=True)
        drawn = list(flight)
        return np.array(drawn, np.int32).reshape(len(drawn), len(rows))

    def launch(self, rows: Sequence[DecodeRow], page_table: Int32, num_steps: int) -> Flight:
        """Start drawing `num_steps` tokens of each row; see `DecodesMany`."""
        return self._depart(rows, page_table, num_steps)

    def token_times(
        self, rows: Sequence[DecodeRow], page_table: Int32, num_steps: int
    ) -> list[int]:
        """See `TimesTokens`."""
        return self._depart(rows, page_table, num_steps).arrivals()

    def _depart(
        self,
        rows: Sequence[DecodeRow],
        page_table: Int32,
        num_steps: int,
        *,
        stop_after: int = 0,
        keep: bool = False,
    ) -> Flight:
        """Launch; with `keep` the logits of the last step stay in `logits`."""
        self._land()
        self._upload(page_table)
        flight = Flight(num_steps, self._plan.machine.max_rows, len(rows))
        args = self._step_args(len(rows))
        args.out_tokens, args.stop = flight.ring.data_ptr(), flight.stop_word.data_ptr()
        args.trace = self.trace.data_ptr()
        args.num_steps, args.stop_after = num_steps, stop_after
        args.firm_steps = int(self._in_vain and not keep)
        self._in_vain &= keep
        args.max_pages = page_table.shape[1]
        args.kept_rows = (1 << len(rows)) - 1 if keep else 0
        for i, row in enumerate(rows):
            same = i > 0 and row.slot == rows[i - 1].slot
            args.tokens[i], args.positions[i], args.slots[i] = row.token_id, row.position, row.slot
            args.bases[i] = args.bases[i - 1] if same else row.position
        self._choices.fill(args, [row.choice for row in rows])
        # No packet carries the first tag; the rest holds NaN in tests.
        self._exchange[: None if self._instruments.poison else self._packet_bytes].fill_(255)
        args.epoch = self._take_epochs(num_steps)
        if self._instruments.trace_moments:
            self.trace.zero_()
        kernel, shared = self._kernels[row_class(len(rows))], self.ring(len(rows)).shared_bytes
        kernel.launch(self._plan.machine.num_ctas, shared, self._stream.cuda_stream, args)
        flight.depart(self._stream, self._check_watchdog)
        self._flight = flight
        return flight

    def _take_epochs(self, num_steps: int) -> int:
        """The number of the launch's first layer; every layer of every step has its own."""
        layers = num_steps * self._plan.spec.num_layers
        if self.epoch + layers >= NO_EPOCH:
            self._exchange[self._packet_bytes :].zero_()
            self._abandon.zero_()
            self.epoch = 1
        first, self.epoch = self.epoch, self.epoch + layers
        return first

    def _land(self) -> None:
        """End the launch that may still be on its way; its reader sees that it was cut short."""
        if self._flight is not None:
            flight, self._flight = self._flight, None
            flight.land()
            self._in_vain |= flight.in_vain

    def ring(self, rows: int) -> Ring:
        """How a launch of `rows` rows shares the shared memory."""
        return self._rings[row_class(rows)]

    def _ring(self, rows: int) -> Ring:
        """Of the kernel of up to `rows` rows: as many slots as fit beside the activations."""
        x_bytes, slot = activation_bytes(self._plan, rows), slot_bytes(self._plan)
        slots: int = min(MAX_SLOTS, (self._kernels[rows].max_dynamic_shared - x_bytes) // slot)
        if slots < MIN_SLOTS:
            raise OutOfMemoryError(
                f"{rows} rows need {x_bytes} bytes of shared memory and leave room for "
                f"{slots} slots of the ring, at least {MIN_SLOTS} are needed; use a smaller batch"
            )
        in_flight = copies_in_flight(self._plan, rows, slots)
        return Ring(x_bytes, slots, x_bytes + slots * slot, in_flight)

    def read_bandwidth(self, seconds: float = 0.2, *, own_image: bool = True) -> float:
        """GB/s of the decoder's ring over the image with no work and no hand-offs: the limit.

        Measures for about `seconds` and returns the median. There is nothing but the image to
        read, so `own_image` changes nothing.
        """
        kernel = self._load("stream", compile_kernel(self._plan, "stream", rows=1))
        args = self._step_args(rows=1)
        args.x_bytes = 0
        slot = slot_bytes(self._plan)
        args.num_slots = min(MAX_SLOTS, kernel.max_dynamic_shared // slot)
        in_flight = self.in_flight or copies_in_flight(self._plan, 1, args.num_slots)
        args.in_flight, args.full_in_flight = in_flight
        nbytes = ctypes.c_uint64(self._plan.image_bytes // slot * slot)
        samples: list[float] = []
        spent = 0.0
        while spent < seconds or len(samples) < 4:
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record(self._stream)
            shared = args.num_slots * slot
            kernel.launch(
                self._plan.machine.num_ctas, shared, self._stream.cuda_stream, args, nbytes
            )
            end.record(self._stream)
            end.synchronize()
            spent += begin.elapsed_time(end) / 1e3
            samples.append(nbytes.value / begin.elapsed_time(end) / 1e6)
        self._check_watchdog()
        kernel.close()
        return float(np.median(samples[1:]))

    def timeline(self) -> npt.NDArray[np.uint64]:
        """The last launch's moments: [num_ctas, tracks, trace_moments, 2] (serve/benchmark)."""
        words: npt.NDArray[np.int64] = self.trace.cpu().numpy()
        return words.view(np.uint64)

    def exchange_buffer(self, name: str) -> npt.NDArray[Any]:
        """What the last launch left in a buffer of `codegen.exchange`: [rows, width]."""
        at, buffer = find_buffer(self._plan, name)
        stored = self._exchange[at : at + buffer.nbytes].cpu().numpy()
        return read_buffer(self._plan, buffer, stored)

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        with contextlib.suppress(FlashFormerError):
            self._land()
        for kernel in self._kernels.values():
            kernel.close()
        for name in ("_image", "_kv", "_exchange", "_logits", "_prefill"):
            setattr(self, name, torch.zeros(0))
        torch.cuda.empty_cache()

    def _load_decoders(self) -> dict[int, Kernel]:
        """One kernel a row class, compiled side by side."""

        def compile_for(rows: int) -> Cubin:
            return compile_kernel(self._plan, "decode", self._instruments, rows, apart=True)

        classes = row_classes(self._plan.machine)
        found: dict[int, Kernel] = {}
        self._progress("compiling", 0, len(classes))
        with ThreadPoolExecutor() as pool:
            for rows, cubin in zip(classes, pool.map(compile_for, classes), strict=True):
                found[rows] = self._load("decode", cubin)
                self._progress("compiling", len(found), len(classes))
        return found

    def _load(self, name: str, cubin: Cubin) -> Kernel:
        kernel = Kernel(cubin, name, 32 * NUM_WARPS, self._plan.machine.shared_bytes)
        kernel.require_one_cta_an_sm(self._plan.machine.num_ctas)
        return kernel

    def _moved(self, image: npt.NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:
        if isinstance(image, torch.Tensor):
            return image.to(self._device)
        moved = torch.empty(image.nbytes, dtype=torch.uint8, device=self._device)
        for first in range(0, image.nbytes, MOVED_BYTES):
            part = image[first : first + MOVED_BYTES]
            check(driver.cuMemcpyHtoD(moved.data_ptr() + first, part.ctypes.data, part.nbytes))
            self._progress("moving to the GPU", first + part.nbytes, image.nbytes)
        return moved

    def _zeros(self, shape: int | tuple[int, ...], dtype: Any = torch.uint8) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def _step_args(self, rows: int) -> Any:
        args = CudaStepArgs()
        args.image, args.kv = self._image.data_ptr(), self._kv.data_ptr()
        args.exchange, args.logits = self._exchange.data_ptr(), self._logits.data_ptr()
        args.page_table = self._page_table.data_ptr()
        args.barrier, args.abandon = self._barrier.data_ptr(), self._abandon.data_ptr()
        args.watchdog, args.wait_limit_ns = self._watchdog.data_ptr(), self.wait_limit_ns
        args.delay_seed, (args.drop_matrix, args.drop_cta) = self.delay_seed, self.drop
        ring = self.ring(rows)
        args.x_bytes, args.num_slots = ring.x_bytes, ring.num_slots
        args.in_flight, args.full_in_flight = self.in_flight or ring.in_flight
        args.num_rows, args.num_pages = rows, self._num_pages
        return args

    def _upload(self, page_table: Int32) -> None:
        if self._known_pages is None or not np.array_equal(self._known_pages, page_table):
            self._known_pages = page_table.copy()
            self._page_table = torch.as_tensor(self._known_pages).to(self._device)

    def _check_watchdog(self) -> None:
        word = int(self._watchdog[0]) & 0xFFFFFFFF
        if word == 0:
            return
        self._watchdog.zero_()
        self._barrier.zero_()
        layers = self._plan.spec.num_layers
        raise FlashFormerError(describe(word, layers, self.wait_limit_ns))


def row_class(rows: int) -> int:
    """The most rows of the kernel that runs a step of `rows`."""
    return next(most for most in ROW_CLASSES if rows <= most)
