"""Arguments of a compiled kernel: one list of fields gives a C++ struct and a ctypes one."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Field:
    """One member of the struct, in both languages."""

    name: str
    cxx: str
    ctype: Any
    doc: str
    length: int = 0  # of an array; 0: a single value


def pointer(name: str, pointee: str, doc: str) -> Field:
    """An address in the memory of the machine that runs the kernel."""
    return Field(name, f"{pointee}*", ctypes.c_void_p, doc)


def integer(name: str, doc: str, length: int = 0) -> Field:
    """A 32-bit number, or an array of them."""
    return Field(name, "int", ctypes.c_int32, doc, length)


def unsigned(name: str, doc: str, bits: int = 32, length: int = 0) -> Field:
    """An unsigned number of 32 or 64 bits, or an array of them."""
    if bits == 64:
        return Field(name, "unsigned long long", ctypes.c_uint64, doc, length)
    return Field(name, "unsigned int", ctypes.c_uint32, doc, length)


def real(name: str, doc: str, length: int = 0) -> Field:
    """A float32, or an array of them."""
    return Field(name, "float", ctypes.c_float, doc, length)


def render_struct(fields: Sequence[Field]) -> str:
    """The C++ definition of `StepArgs`."""
    members = [
        f"  {f.cxx} {f.name}{f'[{f.length}]' if f.length else ''};  // {f.doc}" for f in fields
    ]
    return "\n".join(["struct StepArgs {", *members, "};"])


def ctypes_fields(fields: Sequence[Field]) -> list[tuple[str, Any]]:
    """`_fields_` of the same struct in Python."""
    return [(f.name, f.ctype * f.length if f.length else f.ctype) for f in fields]
