"""The decoder on one GPU: everything in its memory, one launch for many tokens."""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from cuda.bindings import driver

from flashformer.backends.base import Fit, Int32, StepBatch, StepResult
from flashformer.backends.cuda.compile import compile_kernel
from flashformer.backends.cuda.launch import Kernel, check
from flashformer.backends.cuda.machine import cuda_machine
from flashformer.backends.cuda.memory import (
    fitting_context,
    past_bytes_per_token,
    require_gpu_memory,
)
from flashformer.backends.cuda.prefill import Prefill
from flashformer.codegen.cache import load_image
from flashformer.codegen.cuda_args import CudaStepArgs
from flashformer.codegen.cuda_header import MATRICES, SLOT_BYTES, WINDOW_BYTES
from flashformer.codegen.exchange import exchange, exchange_bytes, padded
from flashformer.codegen.instruments import NONE, TRACKS, Instruments
from flashformer.errors import FlashFormerError, OutOfMemoryError
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import WeightSource
from flashformer.plan.plan import Plan, PlanOptions, make_plan

NUM_WARPS = {"decode": 10, "stream": 9}  # eight consumers, the producer; decode has a prefetcher
MAX_SLOTS = 16  # of the ring: kernel/cta.cuh
MIN_SLOTS = 4
PREFILL_PASSES = 3  # over the weights by `Prefill`: it reads the image, writes the slab, reads it
WAITS = {  # WaitKind of kernel/cta.cuh
    1: "a slot of the ring to be filled",
    2: "a slot of the ring to be released",
    3: "a copy to land",
    4: "the other CTAs at the end of the token",
    5: "the keys and values of the token before",
    6: "the last copies to land",
    7: "a packet of another CTA",
}


def open_cuda(
    spec: ModelSpec,
    weights: WeightSource,
    options: PlanOptions,
    *,
    num_pages: int,
    progress: Callable[[str, int, int], None] | None = None,
    instruments: Instruments = NONE,
) -> "CudaBackend":
    """Plan for the first GPU, pack or read the image, compile, and move in.

    float32 weights are stored as bf16: the tensor cores multiply 16 bits. Raises
    `OutOfMemoryError` before anything is allocated, and what planning and compiling raise.
    """
    options = replace(
        options,
        format=_sixteen_bits(options.format),
        head_format=_sixteen_bits(options.head_format),
    )
    plan = make_plan(spec, cuda_machine(spec), options)
    check(driver.cuInit(0))
    require_gpu_memory(plan, num_pages, torch.cuda.mem_get_info(0)[0])
    image = load_image(plan, weights, progress=progress)
    return CudaBackend(plan, image, num_pages, instruments)


def fit(spec: ModelSpec, weight_format: str, batch: int) -> Fit:
    """What of a model fits the memory that the first GPU has free."""
    name = _sixteen_bits(weight_format)
    plan = make_plan(spec, cuda_machine(spec), PlanOptions(name, name, 1, batch))
    free = torch.cuda.mem_get_info(0)[0]
    past = past_bytes_per_token(plan)
    return Fit(name, plan.image_bytes, past, free, fitting_context(plan, free))


def measure_bandwidth() -> float:
    """`CudaBackend.read_bandwidth` over memory that holds no model."""
    spec = ModelSpec.from_hf(SHAPES["llama-3.2-1b"])
    plan = make_plan(spec, cuda_machine(spec), PlanOptions(context=64, max_batch=1))
    require_gpu_memory(plan, 1, torch.cuda.mem_get_info(0)[0])
    image = torch.zeros(plan.image_bytes, dtype=torch.uint8, device="cuda")
    backend = CudaBackend(plan, image, num_pages=1)
    found = backend.read_bandwidth()
    backend.close()
    return found


class CudaBackend:
    """Runs a plan on the current CUDA device. Not thread-safe.

    For tests: `wait_limit_ns`, after which a wait in the kernel gives up; `delay_seed` and `drop`
    (matrix from 1, CTA), which a kernel built with those instruments obeys.
    """

    wait_limit_ns = 2_000_000_000
    delay_seed = 0
    drop = (0, 0)

    def __init__(
        self,
        plan: Plan,
        image: npt.NDArray[np.uint8] | torch.Tensor,
        num_pages: int,
        instruments: Instruments = NONE,
    ) -> None:
        """`image` [plan.image_bytes] in host or device memory; it is not kept if it is the host's.

        With `instruments.trace_moments` the last launch's timeline lies in `trace`.
        """
        self._plan = plan
        self._num_pages = num_pages
        self._layer = plan.spec.layers[0]
        self._device = torch.device("cuda", 0)
        self._stream = torch.cuda.current_stream(self._device)  # makes the context current
        self._instruments = instruments
        self._kernel = self._load("decode", instruments)
        rows, machine = plan.machine.max_rows, plan.machine
        self._packet_bytes, all_bytes = exchange_bytes(plan)
        self._image = self._moved(image)
        self._kv = self._zeros(num_pages * machine.page_tokens * past_bytes_per_token(plan))
        self._exchange = self._zeros(all_bytes)
        self._logits = self._zeros((rows, plan.spec.vocab_size), torch.float32)
        self._barrier_start = instruments.counter_start
        self._barrier = torch.tensor([self._barrier_start], device=self._device).to(torch.int32)
        self._arrivals = self._zeros(rows * self._layer.num_kv_heads, torch.int32)
        self._watchdog = torch.zeros(8, dtype=torch.int32, pin_memory=True)
        moments = (machine.num_ctas, len(TRACKS), max(1, instruments.trace_moments), 2)
        self.trace = self._zeros(moments, torch.int64)
        self._page_table = torch.zeros(0, dtype=torch.int32, device=self._device)
        self._known_pages: Int32 | None = None
        self._prefill = Prefill(plan, self._image, self._kv)
        self._prefill.warm_up(num_pages)
        self._kv.fill_(255 if instruments.poison else 0)  # NaN in tests

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
        return self._logits

    @property
    def kernel(self) -> Kernel:
        """The decoder as loaded."""
        return self._kernel

    def step(self, batch: StepBatch) -> StepResult:
        """Run the rows through the model: `max_rows` a launch, prompts through `Prefill`.

        A few launches pass over the weights as often as `Prefill` does, so it gets what needs more.
        """
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
            result.logits[here] = self._logits[picked].cpu().numpy()
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
        rows = len(token_ids)
        self._upload(page_table)
        out = torch.empty(
            (num_steps, self._plan.machine.max_rows), dtype=torch.int32, device=self._device
        )
        args = self._step_args(rows)
        args.out_tokens, args.trace = out.data_ptr(), self.trace.data_ptr()
        args.num_steps, args.stop_after = num_steps, stop_after
        args.max_pages = page_table.shape[1]
        for i in range(rows):
            same = i > 0 and slots[i] == slots[i - 1]
            args.tokens[i], args.positions[i] = int(token_ids[i]), int(positions[i])
            args.slots[i] = int(slots[i])
            args.bases[i] = args.bases[i - 1] if same else int(positions[i])
        # No packet carries the first tag; the rest holds NaN in tests.
        self._exchange[: None if self._instruments.poison else self._packet_bytes].fill_(255)
        shared = args.x_bytes + args.num_slots * SLOT_BYTES
        if self._instruments.trace_moments:
            self.trace.zero_()
        self._kernel.launch(self._plan.machine.num_ctas, shared, self._stream.cuda_stream, args)
        result = out.cpu().numpy()[:, :rows]
        self._check_watchdog()
        if not stop_after:
            arrivals = num_steps * self._plan.machine.num_ctas
            self._barrier_start = (self._barrier_start + arrivals) % 2**32
        return result

    def x_bytes(self, rows: int) -> int:
        """Shared memory of the activations of `rows` rows, and the scratch of attention."""
        spec, layer = self._plan.spec, self._layer
        need = [_attention_scratch(layer.head_dim, layer.num_q_heads // layer.num_kv_heads)]
        need.append(rows * (padded(spec.hidden_size) * 2 + 32))
        # Wider activations come in windows, two at a time (kernel/stages.cuh).
        limit = 2 * (WINDOW_BYTES + 32 * rows)
        for cols in (layer.q_rows, layer.intermediate_size):
            need.append(min(rows * (padded(cols) * 2 + 32), limit))
        return -(-max(need) // 128) * 128

    def num_slots(self, rows: int) -> int:
        """Slots of the ring that fit beside the activations."""
        free = self._plan.machine.shared_bytes - self._kernel.static_shared - self.x_bytes(rows)
        slots = min(MAX_SLOTS, free // SLOT_BYTES)
        if slots < MIN_SLOTS:
            raise OutOfMemoryError(
                f"{rows} rows need {self.x_bytes(rows)} bytes of shared memory and leave room for "
                f"{slots} slots of the ring, at least {MIN_SLOTS} are needed; use a smaller batch"
            )
        return slots

    def read_bandwidth(self, seconds: float = 0.2, *, own_image: bool = True) -> float:
        """GB/s of the decoder's ring over the image with no work and no hand-offs: the limit.

        Measures for about `seconds` and returns the median. There is nothing but the image to
        read, so `own_image` changes nothing.
        """
        kernel = self._load("stream")
        args = self._step_args(rows=1)
        args.x_bytes = 0
        args.num_slots = min(MAX_SLOTS, kernel.max_dynamic_shared // SLOT_BYTES)
        nbytes = ctypes.c_uint64(self._plan.image_bytes // SLOT_BYTES * SLOT_BYTES)
        samples: list[float] = []
        spent = 0.0
        while spent < seconds or len(samples) < 4:
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record(self._stream)
            shared = args.num_slots * SLOT_BYTES
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
        at = 0
        for buffer in exchange(self._plan):
            if buffer.name == name:
                break
            at += buffer.nbytes
        size = buffer.rows * buffer.width * buffer.element_bytes
        found = self._exchange[at : at + size].cpu().numpy()
        half = np.float16 if self._plan.options.format == "f16" else ml_dtypes.bfloat16
        dtype = np.float32 if buffer.element_bytes == 4 else half
        return found.view(dtype).reshape(buffer.rows, buffer.width)

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        self._kernel.close()
        for name in ("_image", "_kv", "_exchange", "_logits", "_prefill"):
            setattr(self, name, torch.zeros(0))
        torch.cuda.empty_cache()

    def _load(self, name: str, instruments: Instruments = NONE) -> Kernel:
        cubin = compile_kernel(self._plan, name, instruments)
        kernel = Kernel(cubin, name, 32 * NUM_WARPS[name], self._plan.machine.shared_bytes)
        kernel.require_one_cta_an_sm(self._plan.machine.num_ctas)
        return kernel

    def _moved(self, image: npt.NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:
        if isinstance(image, torch.Tensor):
            return image.to(self._device)
        moved = torch.empty(image.nbytes, dtype=torch.uint8, device=self._device)
        check(driver.cuMemcpyHtoD(moved.data_ptr(), image.ctypes.data, image.nbytes))
        return moved

    def _zeros(self, shape: int | tuple[int, ...], dtype: Any = torch.uint8) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def _step_args(self, rows: int) -> Any:
        args = CudaStepArgs()
        args.image, args.kv = self._image.data_ptr(), self._kv.data_ptr()
        args.exchange, args.logits = self._exchange.data_ptr(), self._logits.data_ptr()
        args.page_table = self._page_table.data_ptr()
        args.barrier, args.arrivals = self._barrier.data_ptr(), self._arrivals.data_ptr()
        args.watchdog, args.wait_limit_ns = self._watchdog.data_ptr(), self.wait_limit_ns
        args.delay_seed, (args.drop_matrix, args.drop_cta) = self.delay_seed, self.drop
        args.barrier_start = self._barrier_start
        args.x_bytes, args.num_slots = self.x_bytes(rows), self.num_slots(rows)
        args.num_rows, args.num_pages = rows, self._num_pages
        return args

    def _upload(self, page_table: Int32) -> None:
        if self._known_pages is None or not np.array_equal(self._known_pages, page_table):
            self._known_pages = page_table.copy()
            self._page_table = torch.as_tensor(self._known_pages).to(self._device)

    def _check_watchdog(self) -> None:
        kind, cta, warp, matrix = (int(x) for x in self._watchdog[:4])
        if kind == 0:
            return
        self._watchdog.zero_()
        self._barrier.zero_()
        self._arrivals.zero_()
        self._barrier_start = 0
        layer, stage = divmod(matrix, len(MATRICES))
        head = layer == self._plan.spec.num_layers
        where = "lm_head" if head else f"{MATRICES[stage]} of layer {layer}"
        raise FlashFormerError(
            f"the CUDA kernel gave up after {self.wait_limit_ns / 1e9:g} s: warp {warp} of CTA "
            f"{cta} waited for {WAITS.get(kind, kind)}, at {where}; the step was abandoned, please "
            "report this"
        )


def _sixteen_bits(name: str) -> str:
    return "bf16" if name == "f32" else name


def _attention_scratch(head_dim: int, group: int) -> int:
    """AttentionScratch of kernel/attention.cuh."""
    output_dims = min(padded(head_dim), 128) if group <= 4 else 64
    floats = 8 * padded(head_dim) + 8 * 32 + 8 * group * output_dims
    return 3 * padded(head_dim) * 32 + 4 * floats
