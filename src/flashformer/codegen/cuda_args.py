"""The arguments of one launch of the CUDA kernel: rendered as C++ and built as ctypes."""

import ctypes
from dataclasses import dataclass
from typing import Any

POINTER = ctypes.c_uint64  # a device address

CXX_TYPES: dict[Any, str] = {
    ctypes.c_int32: "int",
    ctypes.c_uint32: "unsigned int",
    ctypes.c_uint64: "unsigned long long",
}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of an argument struct."""

    name: str
    ctype: Any
    pointee: str = ""  # C++ type that a POINTER points to
    length: int = 0  # of an array; 0: a scalar
    doc: str = ""


STEP_ARGS = (
    Field("image", POINTER, "const unsigned char", doc="packed weights"),
    Field("kv", POINTER, "unsigned char", doc="[layers][pages][kv heads][keys, values]"),
    Field("exchange", POINTER, "unsigned char", doc="buffers between stages (hidden.cuh)"),
    Field("logits", POINTER, "float", doc="[max_rows][vocab_size] of the last step"),
    Field("page_table", POINTER, "const int", doc="[max_batch][max_pages]"),
    Field("out_tokens", POINTER, "int", doc="[num_steps][max_rows]"),
    Field("barrier", POINTER, "unsigned int", doc="the grid barrier's counter"),
    Field("arrivals", POINTER, "unsigned int", doc="[max_rows][kv heads], zero"),
    Field(
        "watchdog", POINTER, "unsigned int", doc="[8], pinned host memory: first wait to time out"
    ),
    Field("trace", POINTER, "unsigned long long", doc="[num_ctas][trace_moments], ns"),
    Field("wait_limit_ns", ctypes.c_uint64, doc="no wait lasts longer"),
    Field("barrier_start", ctypes.c_uint32, doc="value of the counter before the launch"),
    Field("x_bytes", ctypes.c_uint32, doc="shared memory of the activations"),
    Field("num_slots", ctypes.c_int32, doc="slots of the ring"),
    Field("num_rows", ctypes.c_int32),
    Field("num_steps", ctypes.c_int32),
    Field("num_pages", ctypes.c_int32, doc="KV pages of a layer"),
    Field("max_pages", ctypes.c_int32, doc="columns of page_table"),
    Field("stop_after", ctypes.c_int32, doc="end after this many matrices; 0: run to the end"),
    Field("tokens", ctypes.c_int32, length=8),
    Field("positions", ctypes.c_int32, length=8),
    Field("bases", ctypes.c_int32, length=8, doc="positions of the row's sequence stored before"),
    Field("slots", ctypes.c_int32, length=8, doc="row of page_table"),
)


def render_struct(name: str, fields: tuple[Field, ...]) -> str:
    """The C++ definition."""
    lines = []
    for f in fields:
        kind = f"{f.pointee}*" if f.pointee else CXX_TYPES[f.ctype]
        array = f"[{f.length}]" if f.length else ""
        lines.append(f"  {kind} {f.name}{array};" + (f"  // {f.doc}" if f.doc else ""))
    return "\n".join([f"struct {name} {{", *lines, "};"])


def make_ctypes(name: str, fields: tuple[Field, ...]) -> type[ctypes.Structure]:
    """The same struct for Python."""
    members = [(f.name, f.ctype * f.length if f.length else f.ctype) for f in fields]
    return type(name, (ctypes.Structure,), {"_fields_": members})


CudaStepArgs = make_ctypes("StepArgs", STEP_ARGS)
