"""The CUDA backend: one persistent cooperative kernel runs the whole decoder for many tokens."""
