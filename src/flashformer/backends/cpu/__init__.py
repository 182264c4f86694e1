"""The CPU backend: one C++ function for the whole model, compiled at first use."""
