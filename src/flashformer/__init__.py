"""FlashFormer: whole-model kernels for low-batch LLM decoding."""

__version__ = "0.1.0"
