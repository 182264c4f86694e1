"""The arguments of one CPU step, written once: rendered as a C++ struct and built as ctypes.

`STEP_ARGS` -> `render_struct()` for config.h, `StepArgs` for Python.
"""

import ctypes
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Field:
    """One member of the struct, in both languages."""

    name: str
    cxx: str
    ctype: Any
    doc: str


def _pointer(name: str, pointee: str, doc: str) -> Field:
    return Field(name, f"{pointee}*", ctypes.c_void_p, doc)


def _number(name: str, doc: str) -> Field:
    return Field(name, "int", ctypes.c_int, doc)


STEP_ARGS = (
    _pointer("image", "const unsigned char", "packed weights"),
    _pointer("kv_pages", "float", "keys and values of all layers"),
    _pointer("token_ids", "const int", "[num_rows]"),
    _pointer("positions", "const int", "[num_rows]"),
    _pointer("slots", "const int", "[num_rows]: row of page_table"),
    _pointer("page_table", "const int", "[max_batch][max_pages]"),
    _pointer("logit_rows", "const int", "[num_logit_rows], ascending"),
    _pointer("logits", "float", "[num_logit_rows][vocab_size], written"),
    _pointer("argmax", "int", "[num_logit_rows], written"),
    _number("num_rows", "tokens of this step"),
    _number("num_logit_rows", "rows whose logits are wanted"),
    _number("max_pages", "columns of page_table"),
    _number("num_pages", "KV pages that exist"),
    _number("stop_after", "index of the plan's last stage to run; -1: all"),
)


class StepArgs(ctypes.Structure):
    """One step, as the compiled kernel sees it."""

    _fields_ = [(f.name, f.ctype) for f in STEP_ARGS]


def render_struct() -> str:
    """The C++ definition of `StepArgs`."""
    members = [f"  {f.cxx} {f.name};  // {f.doc}" for f in STEP_ARGS]
    return "\n".join(["struct StepArgs {", *members, "};"])
