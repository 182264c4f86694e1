"""FlashFormer: whole-model kernels for low-batch LLM decoding."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashformer.engine.llm import LLM
    from flashformer.engine.outputs import CompletionOutput, RequestOutput, StreamChunk
    from flashformer.engine.sampling import SamplingParams
    from flashformer.errors import (
        CheckpointError,
        CompileError,
        FlashFormerError,
        OutOfMemoryError,
        ParameterError,
        PlanError,
        UnsupportedModelError,
        UsageError,
    )
    from flashformer.model.spec import ModelSpec

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CheckpointError",
    "CompileError",
    "CompletionOutput",
    "FlashFormerError",
    "ModelSpec",
    "OutOfMemoryError",
    "ParameterError",
    "PlanError",
    "RequestOutput",
    "SamplingParams",
    "StreamChunk",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
]
_MODULES = {
    "LLM": "flashformer.engine.llm",
    "CompletionOutput": "flashformer.engine.outputs",
    "ModelSpec": "flashformer.model.spec",
    "RequestOutput": "flashformer.engine.outputs",
    "SamplingParams": "flashformer.engine.sampling",
    "StreamChunk": "flashformer.engine.outputs",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that `import flashformer` stays quick."""
    import importlib

    if name not in __all__:
        raise AttributeError(f"module 'flashformer' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES.get(name, "flashformer.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
