"""Kernels in the driver's hands: cubin -> loaded, launched; cooperatively where CTAs wait."""

import ctypes
from collections.abc import Sequence
from typing import Any
from weakref import finalize

from cuda.bindings import driver

from flashformer.backends.cuda.compile import Cubin
from flashformer.errors import FlashFormerError, UsageError


class Kernel:
    """A loaded kernel of one CTA an SM."""

    def __init__(self, cubin: Cubin, name: str, threads: int, shared_bytes: int) -> None:
        """`shared_bytes`: shared memory that one CTA may have, static and dynamic."""
        self.resources = cubin.resources
        self.threads = threads
        self._module: Any = check(driver.cuModuleLoadData(cubin.code))
        self._function: Any = check(driver.cuModuleGetFunction(self._module, name.encode()))
        attributes = driver.CUfunction_attribute
        self.static_shared: int = check(
            driver.cuFuncGetAttribute(
                attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, self._function
            )
        )
        self.max_dynamic_shared = shared_bytes - self.static_shared
        check(
            driver.cuFuncSetAttribute(
                self._function,
                attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                self.max_dynamic_shared,
            )
        )

    def require_one_cta_an_sm(self, num_ctas: int) -> None:
        """Refuse a grid whose CTAs could not all run at once: they wait for each other."""
        fitting = check(
            driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                self._function, self.threads, self.max_dynamic_shared
            )
        )
        device = check(driver.cuCtxGetDevice())
        count = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        num_sms = check(driver.cuDeviceGetAttribute(count, device))
        if fitting * num_sms < num_ctas:
            raise UsageError(
                f"the kernel needs {num_ctas} CTAs at once and this GPU can run "
                f"{fitting * num_sms}; use --device cpu"
            )

    def launch(self, num_ctas: int, shared: int, stream: int, *args: Any) -> None:
        """Start `num_ctas` CTAs with `shared` bytes of dynamic shared memory; `args` are ctypes."""
        pointers = (ctypes.c_void_p * len(args))(*(ctypes.addressof(a) for a in args))
        grid, block = (num_ctas, 1, 1), (self.threads, 1, 1)
        check(
            driver.cuLaunchCooperativeKernel(
                self._function, *grid, *block, shared, stream, ctypes.addressof(pointers)
            )
        )

    def close(self) -> None:
        """Unload; a second call does nothing."""
        if self._module is not None:
            check(driver.cuModuleUnload(self._module))
            self._module = None


class Functions:
    """Several kernels of one cubin whose CTAs do not wait for each other."""

    def __init__(self, cubin: Cubin, names: Sequence[str], threads: int) -> None:
        """`threads`: of one CTA, of every kernel."""
        self._threads = threads
        module: Any = check(driver.cuModuleLoadData(cubin.code))
        self._functions: dict[str, Any] = {
            name: check(driver.cuModuleGetFunction(module, name.encode())) for name in names
        }
        finalize(self, driver.cuModuleUnload, module).atexit = False

    def launch(self, name: str, num_ctas: int, stream: int, *values: int) -> None:
        """Start `num_ctas` CTAs of a kernel.

        `values`: pointers, and numbers from 0 on; of 8 bytes each, the kernel reads what it needs.
        """
        storage = (ctypes.c_uint64 * len(values))(*values)
        first = ctypes.addressof(storage)
        pointers = (ctypes.c_void_p * len(values))(*range(first, first + 8 * len(values), 8))
        grid, block = (num_ctas, 1, 1), (self._threads, 1, 1)
        function = self._functions[name]
        check(
            driver.cuLaunchKernel(function, *grid, *block, 0, stream, ctypes.addressof(pointers), 0)
        )


def check(result: tuple[Any, ...]) -> Any:
    """The value of a driver call, or `FlashFormerError` with the driver's name for what failed."""
    status, *values = result
    if int(status) != 0:
        raise FlashFormerError(f"the CUDA driver refused a call: {status.name}")
    return values[0] if values else None
