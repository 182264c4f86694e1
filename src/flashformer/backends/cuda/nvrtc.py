"""One program through NVRTC, here or in a process of its own: a process compiles one at a time.

python nvrtc.py < arguments of `compile_here` as JSON > `Compiled` as JSON, the cubin in base64

Imports nothing of the package, so that such a process starts at once.
"""

import base64
import json
import subprocess
import sys
from typing import Any

Compiled = tuple[str, str, bytes]  # NVRTC's name of the outcome, its log, the cubin if it has one
SUCCESS = "NVRTC_SUCCESS"


def version() -> str:
    """Of the compiler: what it compiles may change with it."""
    from cuda.bindings import nvrtc

    major, minor = checked(nvrtc.nvrtcVersion())
    return f"nvrtc {major}.{minor}"


def compile_here(source: str, name: str, headers: dict[str, str], options: list[str]) -> Compiled:
    """Compile `source`, which may include `headers`. Raises `RuntimeError` if NVRTC is broken."""
    from cuda.bindings import nvrtc

    def read(size_of: Any, into: Any) -> bytes:
        buffer = bytes(int(checked(size_of(program))[0]))
        checked(into(program, buffer))
        return bytes(buffer)

    names, texts = ([text.encode() for text in part] for part in (headers, headers.values()))
    (program,) = checked(
        nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), len(headers), texts, names)
    )
    arguments = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
    log = read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
    code = b""
    if status.name == SUCCESS:
        code = read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    checked(nvrtc.nvrtcDestroyProgram(program))
    return status.name, log.rstrip(b"\0").decode(errors="replace").strip(), code


def compile_apart(source: str, name: str, headers: dict[str, str], options: list[str]) -> Compiled:
    """The same in another process, so that several threads can each have a program compiled.

    In this one where no other can be started.
    """
    arguments = (source, name, headers, options)
    try:
        ended = subprocess.run(
            [sys.executable, "-P", __file__],
            input=json.dumps(arguments).encode(),
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return compile_here(*arguments)
    status, log, code = json.loads(ended.stdout)
    return status, log, base64.b64decode(code)


def checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call returned behind its status. Raises `RuntimeError` if that is not success."""
    status, *values = result
    if status.name != SUCCESS:
        raise RuntimeError(status.name)
    return tuple(values)


if __name__ == "__main__":
    outcome, said, cubin = compile_here(*json.load(sys.stdin))
    json.dump((outcome, said, base64.b64encode(cubin).decode()), sys.stdout)
