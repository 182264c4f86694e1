"""The decoder as a chain of separate kernels in a CUDA graph, with programmatic dependent launch.

`Chain(backend, ...)` -> the tokens that one replay draws, and its time
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cuda.bindings import driver

from flashformer.backends.base import Int32
from flashformer.backends.cuda import CudaBackend
from flashformer.backends.cuda.compile import build_cubin
from flashformer.backends.cuda.launch import check
from flashformer.codegen.cuda_header import render_cuda
from flashformer.plan.plan import Plan
from flashformer.quant.formats import TILE_ROWS

HERE = Path(__file__).parent
KERNELS = ("qkv", "attend", "o_proj", "gate_up", "down", "lm_head", "last_token")
LAYER = KERNELS[:5]
THREADS = 320


class Chain:
    """A graph that decodes some tokens of one sequence of a backend, whose memory it uses."""

    def __init__(
        self, backend: CudaBackend, page_table: Int32, token: int, position: int, num_tokens: int
    ) -> None:
        """`position` is that of `token`, the first that goes in."""
        plan, rows = backend.plan, backend.plan.machine.max_rows
        self._plan, self._backend = plan, backend
        self.module: Any = check(driver.cuModuleLoadData(self._cubin(plan)))
        self._functions = {name: self._function(name) for name in KERNELS}
        self._out = torch.zeros((num_tokens, rows), dtype=torch.int32, pin_memory=True)
        self._pages = torch.as_tensor(page_table, device="cuda")
        tiles = -(-plan.spec.hidden_size // TILE_ROWS)
        kept = plan.machine.num_ctas * -(-tiles // plan.machine.num_ctas) * TILE_ROWS
        self._kept = torch.zeros(kept, device="cuda")  # `Kept` of chain.cu
        self._args = backend._step_args(1)
        self._args.page_table, self._args.max_pages = self._pages.data_ptr(), page_table.shape[1]
        self._args.out_tokens = self._out.data_ptr()
        self._never_stop = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._args.stop = self._never_stop.data_ptr()
        self._args.num_steps, self._args.epoch = num_tokens, 1
        self._args.tokens[0] = token
        self._args.positions[0] = self._args.bases[0] = position
        self._graph = self._captured(num_tokens)

    def run(self) -> Int32:
        """Replay: int32 [num_tokens]."""
        self._graph.replay()
        torch.cuda.synchronize()
        return np.array(self._out[:, 0].numpy())

    def close(self) -> None:
        """Unload."""
        del self._graph
        check(driver.cuModuleUnload(self.module))

    @staticmethod
    def _cubin(plan: Plan) -> bytes:
        return build_cubin(render_cuda(plan, rows=1), "chain", plan.machine.arch, HERE).code

    def _function(self, name: str) -> driver.CUfunction:
        found = check(driver.cuModuleGetFunction(self.module, name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(found, limit, self._shared_bytes()))
        return found

    def _shared_bytes(self) -> int:
        return self._backend.ring(1).shared_bytes

    def _captured(self, num_tokens: int) -> torch.cuda.CUDAGraph:
        exchange, packets = self._backend._exchange, self._backend._packet_bytes
        exchange[:packets].fill_(255)  # loads what is captured below
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            exchange[:packets].fill_(255)  # no packet carries the first tag
            exchange[packets:].zero_()
            launches = list(self._launches(num_tokens))
            for number, (name, layer, step) in enumerate(launches):
                self._launch(name, layer, step, dependent=number > 0)
        return graph

    def _launches(self, num_tokens: int) -> Iterator[tuple[str, int, int]]:
        layers = self._plan.spec.num_layers
        for step in range(num_tokens):
            for layer in range(layers):
                yield from ((name, layer, step) for name in LAYER)
            yield "lm_head", layers, step
        yield "last_token", 0, num_tokens

    def _launch(self, name: str, layer: int, step: int, *, dependent: bool) -> None:
        """Put a kernel on the current stream; a dependent one may begin while the last one ends."""
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = self._plan.machine.num_ctas, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = THREADS, 1, 1
        config.sharedMemBytes = self._shared_bytes()
        config.hStream = torch.cuda.current_stream().cuda_stream
        attribute = driver.CUlaunchAttribute()
        attribute.id = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute] * dependent, int(dependent)
        kept = ctypes.c_void_p(self._kept.data_ptr())
        values = (self._args, kept, ctypes.c_int(layer), ctypes.c_int(step))
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        function = self._functions[name]
        check(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0))
