"""The CUDA backend: one persistent cooperative kernel runs the whole decoder for many tokens."""

from flashformer.backends.cuda.backend import CudaBackend
from flashformer.backends.cuda.machine import cuda_machine
from flashformer.backends.cuda.opening import fit, measure_bandwidth, open_cuda

__all__ = ["CudaBackend", "cuda_machine", "fit", "measure_bandwidth", "open_cuda"]
