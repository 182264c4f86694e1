"""The plan run by compiled code: one library call a step.

Plan + image -> `CpuBackend`.
"""

import contextlib
import ctypes
import mmap
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashformer.backends.base import Float32, StepBatch, StepResult
from flashformer.backends.cpu.compile import compile_kernel
from flashformer.backends.cpu.machine import cpu_machine
from flashformer.codegen.cache import load_image
from flashformer.codegen.header import kv_page_elements
from flashformer.codegen.step_args import StepArgs
from flashformer.errors import CompileError, FlashFormerError, OutOfMemoryError, UsageError
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import WeightSource
from flashformer.plan.pack import Image, IncompressibleError, Progress
from flashformer.plan.plan import Plan, PlanOptions, make_plan

BUFFERS = ("hidden", "q", "attended", "activated")  # in the order of decoder_buffer
READ_TEST_BYTES = 1 << 30  # far beyond every cache
PADDING_BYTES = 4096  # the kernel may load a whole vector at the last element


class CpuBackend:
    """Runs a plan on this computer's cores, `plan.machine.num_ctas` threads. Not thread-safe.

    The threads wait between steps without using the processor. `image` must stay as it is.
    """

    def __init__(self, plan: Plan, image: Image, num_pages: int) -> None:
        self._plan = plan
        self._image = image
        self._num_pages = num_pages
        self._pid = os.getpid()
        self._kv: npt.NDArray[np.uint8] | None = _map_memory(
            4 * num_pages * kv_page_elements(plan), "keys and values", "choose a smaller context"
        )
        self._read_test: npt.NDArray[np.uint8] | None = None
        self._logits = np.empty((0, plan.spec.vocab_size), np.float32)
        self._argmax = np.empty(plan.machine.max_rows, np.int32)
        self._stage_times = np.zeros((plan.machine.num_ctas, 1 + len(plan.stages)), np.int64)
        self._library = _load(compile_kernel(plan))
        self._decoder: int | None = self._library.decoder_open()
        if not self._decoder:
            raise OutOfMemoryError(
                f"The system refused {plan.machine.num_ctas} threads or their buffers; "
                "close other programs or use fewer threads."
            )

    @property
    def plan(self) -> Plan:
        """The plan it runs."""
        return self._plan

    @property
    def num_pages(self) -> int:
        """KV pages that exist."""
        return self._num_pages

    def step(self, batch: StepBatch, stop_after: int = -1) -> StepResult:
        """Run the rows through the model; `stop_after`: up to that stage of the plan, for tests."""
        wanted = len(batch.logit_rows)
        if wanted > len(self._logits):
            self._logits = np.empty((wanted, self._plan.spec.vocab_size), np.float32)
        arrays = [
            np.ascontiguousarray(a, np.int32)
            for a in (batch.token_ids, batch.positions, batch.slots, batch.page_table)
        ]
        logit_rows = np.ascontiguousarray(batch.logit_rows, np.int32)
        table = arrays[3]
        results = (self._logits, self._argmax)
        args = StepArgs(
            self._image.ctypes.data,
            self._open_kv().ctypes.data,
            *(a.ctypes.data for a in (*arrays, logit_rows, *results)),
            self._stage_times.ctypes.data,
            len(arrays[0]),
            wanted,
            table.shape[1],
            self._num_pages,
            stop_after,
        )
        self._library.decoder_step(self._decoder, ctypes.byref(args))
        return StepResult(self._logits[:wanted], self._argmax[:wanted])

    def stage_seconds(self) -> dict[str, float]:
        """Seconds of the last whole step by stage, in the plan's order; its layers together.

        A stage ends when its last CTA has done its part.
        """
        ends = self._stage_times.max(axis=0)
        seconds: dict[str, float] = {}
        for stage, nanoseconds in zip(self._plan.stages, np.diff(ends), strict=True):
            seconds[stage.name] = seconds.get(stage.name, 0.0) + 1e-9 * float(nanoseconds)
        return seconds

    def buffer(self, name: str, rows: int, width: int) -> Float32:
        """A copy of a buffer as the last step left it: [rows, width]; name as in `BUFFERS`."""
        stride = ctypes.c_int64()
        which = BUFFERS.index(name)
        address = self._library.decoder_buffer(self._decoder, which, ctypes.byref(stride))
        found = np.ctypeslib.as_array(address, shape=(rows, stride.value))
        return found[:, :width].copy()

    def read_bandwidth(self, seconds: float = 0.3, *, own_image: bool = False) -> float:
        """GB/s at which the same threads read memory with plain vector loads, for `seconds`.

        Reads 1 GiB of its own, or the packed weights if `own_image`, which costs no memory but
        says nothing about memory if they fit into a cache.
        """
        if own_image:
            test = self._image
        else:
            if self._read_test is None:
                self._read_test = _map_memory(
                    READ_TEST_BYTES, "the read test", "close other programs"
                )
                self._read_test.fill(1)
            test = self._read_test
        self._open_kv()
        rate: float = self._library.decoder_read_bandwidth(
            self._decoder, test.ctypes.data, test.nbytes, seconds
        )
        return rate

    def close(self) -> None:
        """End the threads and free the keys and values; a second call does nothing."""
        if self._decoder and self._pid == os.getpid():
            self._library.decoder_close(self._decoder)
        self._decoder = None
        self._kv = None
        self._read_test = None

    def _open_kv(self) -> npt.NDArray[np.uint8]:
        if self._kv is None:
            raise UsageError("The backend is closed; open the model again.")
        if self._pid != os.getpid():
            raise FlashFormerError(
                "The model was opened before this process was forked, and its threads did not come "
                "along; open it in the child process."
            )
        return self._kv


def open_cpu(
    spec: ModelSpec,
    weights: WeightSource,
    options: PlanOptions,
    num_pages: int,
    threads: int | None,
    progress: Progress | None,
) -> CpuBackend:
    """Plan, compile, and pack or read the image; a missing compiler is told before the packing.

    Where bf16 weights need more than 12 bits, the plan is made again with those matrices plain.
    """
    machine = cpu_machine(threads)
    while True:
        plan = make_plan(spec, machine, options)
        if progress is not None:
            progress("compiling", 0, 1)
        compile_kernel(plan)
        if progress is not None:
            progress("compiling", 1, 1)
        try:
            image = load_image(plan, weights, progress=progress)
        except IncompressibleError as found:
            plain = found.matrices
        else:
            return CpuBackend(plan, image, num_pages)
        options = replace(options, plain=plain)


def _map_memory(nbytes: int, use: str, cure: str) -> npt.NDArray[np.uint8]:
    """Zeroed memory that costs nothing until it is touched; freed with its last view."""
    try:
        memory = mmap.mmap(-1, nbytes + PADDING_BYTES)
    except (OSError, OverflowError) as error:
        raise OutOfMemoryError(
            f"There is no room for {use}: {nbytes / 2**30:.2f} GiB; {cure}."
        ) from error
    with contextlib.suppress(AttributeError, OSError):  # not every system has huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileError(
            f"The compiled kernel {path} cannot be loaded ({error}); run `flashformer cache clear`."
        ) from error
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "decoder_open": (pointer, []),
        "decoder_close": (None, [pointer]),
        "decoder_step": (None, [pointer, ctypes.POINTER(StepArgs)]),
        "decoder_buffer": (
            ctypes.POINTER(ctypes.c_float),
            [pointer, ctypes.c_int, ctypes.POINTER(integer)],
        ),
        "decoder_read_bandwidth": (ctypes.c_double, [pointer, pointer, integer, ctypes.c_double]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
