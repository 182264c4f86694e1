"""The decoder on one GPU: image, KV pages and exchange buffers in its memory, one launch for many tokens."""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cuda.bindings import driver

from flashformer.backends.base import Int32, StepBatch, StepResult
from flashformer.backends.cuda.compile import Cubin, compile_kernel
from flashformer.codegen.cuda_args import STEP_ARGS, make_ctypes
from flashformer.codegen.cuda_header import SLOT_BYTES, WINDOW_BYTES, exchange_bytes, padded
from flashformer.errors import FlashFormerError, OutOfMemoryError
from flashformer.plan.plan import Plan

StepArgs = make_ctypes("StepArgs", STEP_ARGS)
THREADS = 320  # eight consumer warps, the producer, the prefetcher: kernel/cta.cuh
MAX_SLOTS = 16
WAIT_LIMIT_NS = 2_000_000_000
X_LIMIT_BYTES = 2 * (WINDOW_BYTES + 1024)  # wider activations come in windows, two at a time
WAITS = (
    "",
    "a slot to be filled",
    "a slot to be released",
    "a copy to land",
    "the grid barrier",
    "the keys and values of the token before",
    "the last copies to land",
    "a packet of another CTA",
)


class CudaBackend:
    """Runs a plan on the current CUDA device. Not thread-safe."""

    def __init__(
        self,
        plan: Plan,
        image: npt.NDArray[np.uint8] | torch.Tensor,
        num_pages: int,
        trace_moments: int = 0,
    ) -> None:
        self._plan = plan
        self._num_pages = num_pages
        self._device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.current_stream(self._device)
        self._layer = plan.spec.layers[0]
        self._image = torch.as_tensor(image).to(self._device)
        kv_bytes = num_pages * plan.machine.page_tokens * plan.spec.num_layers
        kv_bytes *= 2 * self._layer.num_kv_heads * padded(self._layer.head_dim) * 2
        self._kv = torch.zeros(kv_bytes, dtype=torch.uint8, device=self._device)
        self._packet_bytes, total = exchange_bytes(plan)
        self._exchange = torch.zeros(total, dtype=torch.uint8, device=self._device)
        rows = plan.machine.max_rows
        self._logits = torch.zeros((rows, plan.spec.vocab_size), device=self._device)
        counters = 64 + rows * self._layer.num_kv_heads
        self._counters = torch.zeros(counters, dtype=torch.int32, device=self._device)
        self._watchdog = torch.zeros(8, dtype=torch.int32, pin_memory=True)
        self._page_table: torch.Tensor | None = None
        self._page_table_host: Int32 | None = None
        self._barrier_start = 0
        self.cubin: Cubin = compile_kernel(plan, trace_moments=trace_moments)
        self.trace = torch.zeros(
            (plan.machine.num_ctas, max(1, trace_moments)), dtype=torch.int64, device=self._device
        )
        self._load(self.cubin)

    @property
    def plan(self) -> Plan:
        """The plan it runs."""
        return self._plan

    @property
    def num_pages(self) -> int:
        """KV pages that exist."""
        return self._num_pages

    def step(self, batch: StepBatch) -> StepResult:
        """Run the rows through the model, `max_rows` of them a launch."""
        rows = self._plan.machine.max_rows
        logits, argmax = [], []
        for first in range(0, len(batch.token_ids), rows):
            part = slice(first, min(first + rows, len(batch.token_ids)))
            tokens = self.decode(
                batch.token_ids[part],
                batch.positions[part],
                batch.slots[part],
                batch.page_table,
                num_steps=1,
            )
            wanted = batch.logit_rows[
                (batch.logit_rows >= part.start) & (batch.logit_rows < part.stop)
            ]
            if len(wanted):
                picked = torch.as_tensor(wanted - first, device=self._device)
                logits.append(self._logits[picked].cpu().numpy())
                argmax.append(tokens[0, wanted - first])
        if not logits:
            empty = np.zeros((0, self._plan.spec.vocab_size), np.float32)
            return StepResult(empty, np.zeros(0, np.int32))
        return StepResult(np.concatenate(logits), np.concatenate(argmax))

    def decode(
        self,
        token_ids: Int32,
        positions: Int32,
        slots: Int32,
        page_table: Int32,
        num_steps: int,
        stop_after: int = 0,
    ) -> Int32:
        """`num_steps` greedy tokens of up to `max_rows` rows in one launch: int32 [num_steps, rows].

        Rows of one sequence are consecutive, in order of position; more than one a sequence only
        with num_steps = 1. Raises `FlashFormerError` when a wait in the kernel timed out.
        """
        rows = len(token_ids)
        self._upload_pages(page_table)
        assert self._page_table is not None
        out = torch.empty((num_steps, self._plan.machine.max_rows), dtype=torch.int32)
        out = out.to(self._device)
        args = StepArgs()
        args.image, args.kv = self._image.data_ptr(), self._kv.data_ptr()
        args.exchange, args.logits = self._exchange.data_ptr(), self._logits.data_ptr()
        args.page_table, args.out_tokens = self._page_table.data_ptr(), out.data_ptr()
        args.barrier, args.arrivals = self._counters.data_ptr(), self._counters[64:].data_ptr()
        args.watchdog = self._watchdog.data_ptr()
        args.trace = self.trace.data_ptr()
        args.wait_limit_ns = WAIT_LIMIT_NS
        args.barrier_start = self._barrier_start
        args.x_bytes = self.x_bytes(rows)
        args.num_slots = self.num_slots(rows)
        args.num_rows, args.num_steps = rows, num_steps
        args.num_pages, args.max_pages = self._num_pages, page_table.shape[1]
        args.stop_after = stop_after
        for i in range(rows):
            args.tokens[i], args.positions[i] = int(token_ids[i]), int(positions[i])
            args.slots[i] = int(slots[i])
            first = i
            while first > 0 and slots[first - 1] == slots[i]:
                first -= 1
            args.bases[i] = int(positions[first])
        self._exchange[: self._packet_bytes].fill_(255)  # no packet has the first tag
        self._launch(args)
        result = out.cpu().numpy()[:, :rows]
        self._check_watchdog()
        if not stop_after:
            arrivals = num_steps * self._plan.machine.num_ctas
            self._barrier_start = (self._barrier_start + arrivals) % 2**32
        return result

    def x_bytes(self, rows: int) -> int:
        """Shared memory of the activations of `rows` rows (and the scratch of attention)."""
        spec, layer = self._plan.spec, self._layer
        need = [_attention_scratch(layer.head_dim, layer.num_q_heads // layer.num_kv_heads)]
        need.append(rows * (padded(spec.hidden_size) * 2 + 32))
        for cols in (layer.q_rows, layer.intermediate_size):
            wide = rows * (padded(cols) * 2 + 32)
            need.append(min(wide, X_LIMIT_BYTES))
        return -(-max(need) // 128) * 128

    def num_slots(self, rows: int) -> int:
        """Slots of the ring that fit beside the activations."""
        free = self._plan.machine.shared_bytes - self._static_shared - self.x_bytes(rows)
        slots = min(MAX_SLOTS, free // SLOT_BYTES)
        if slots < 4:
            raise OutOfMemoryError(
                f"{rows} rows need {self.x_bytes(rows)} bytes of shared memory and leave room for "
                f"{slots} slots of the ring, at least 4 are needed; use a smaller --max-batch"
            )
        return slots

    def stream_gb_s(self, repeats: int = 5) -> list[float]:
        """GB/s of the decoder's ring over the whole image with no work and no hand-offs: the limit."""
        module = _check(driver.cuModuleLoadData(compile_kernel(self._plan, "stream").code))
        function = _check(driver.cuModuleGetFunction(module, b"stream"))
        dynamic = self._plan.machine.shared_bytes - self._static_shared
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, attribute, dynamic))
        args = StepArgs()
        args.image, args.watchdog = self._image.data_ptr(), self._watchdog.data_ptr()
        args.wait_limit_ns, args.num_slots = WAIT_LIMIT_NS, dynamic // SLOT_BYTES
        nbytes = ctypes.c_uint64(self._image.numel())
        pointers = (ctypes.c_void_p * 2)(ctypes.addressof(args), ctypes.addressof(nbytes))
        stream = torch.cuda.current_stream(self._device)
        samples = []
        for _ in range(repeats + 1):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            _check(
                driver.cuLaunchKernel(
                    function,
                    *(self._plan.machine.num_ctas, 1, 1),
                    *(288, 1, 1),
                    args.num_slots * SLOT_BYTES,
                    stream.cuda_stream,
                    ctypes.addressof(pointers),
                    0,
                )
            )
            end.record(stream)
            end.synchronize()
            samples.append(nbytes.value / begin.elapsed_time(end) / 1e6)
        self._check_watchdog()
        driver.cuModuleUnload(module)
        return samples[1:]

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        if self._module is not None:
            driver.cuModuleUnload(self._module)
            self._module = None
            del self._image, self._kv, self._exchange, self._logits

    def _load(self, cubin: Cubin) -> None:
        self._module = _check(driver.cuModuleLoadData(cubin.code))
        self._function = _check(driver.cuModuleGetFunction(self._module, b"decode"))
        attribute = driver.CUfunction_attribute
        self._static_shared = _check(
            driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, self._function)
        )
        _check(
            driver.cuFuncSetAttribute(
                self._function,
                attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                self._plan.machine.shared_bytes - self._static_shared,
            )
        )

    def _upload_pages(self, page_table: Int32) -> None:
        if self._page_table_host is None or not np.array_equal(self._page_table_host, page_table):
            self._page_table_host = page_table.copy()
            self._page_table = torch.as_tensor(page_table).to(self._device)

    def _launch(self, args: Any) -> None:
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        shared = args.x_bytes + args.num_slots * SLOT_BYTES
        stream = torch.cuda.current_stream(self._device).cuda_stream
        _check(
            driver.cuLaunchCooperativeKernel(
                self._function,
                self._plan.machine.num_ctas,
                1,
                1,
                THREADS,
                1,
                1,
                shared,
                stream,
                ctypes.addressof(pointers),
            )
        )

    def _check_watchdog(self) -> None:
        kind, cta, warp = (int(x) for x in self._watchdog[:3])
        if kind == 0:
            return
        self._watchdog.zero_()
        self._counters.zero_()
        self._barrier_start = 0
        raise FlashFormerError(
            f"the kernel gave up after {WAIT_LIMIT_NS / 1e9:.0f} s: CTA {cta}, warp {warp} waited "
            f"for {WAITS[kind]}; the step was abandoned"
        )


def _attention_scratch(head_dim: int, group: int) -> int:
    """AttentionScratch of kernel/attention.cuh."""
    output_dims = min(padded(head_dim), 128) if group <= 4 else 64
    floats = 8 * padded(head_dim) + 8 * 32 + 8 * group * output_dims
    return 3 * padded(head_dim) * 32 + 4 * floats


def _check(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status) != 0:
        raise FlashFormerError(f"the CUDA driver failed: {status.name}")
    return values[0] if values else None
