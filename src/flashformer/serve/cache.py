"""`flashformer cache`: what the cache holds, and how to empty it."""

import sys
from typing import Annotated

import typer

from flashformer.codegen.cache import KINDS, cache_dir, clear, entries
from flashformer.errors import UsageError
from flashformer.serve import options
from flashformer.serve.terminal import write_json

cache_app = typer.Typer(help="List or clear packed images and compiled kernels.")
Kind = Annotated[str | None, typer.Option("--kind", help="Only images or only kernels.")]


@cache_app.command("list")
def list_entries(
    kind: Kind = None, as_json: options.Json = False, debug: options.Debug = False
) -> None:
    """Show every image and kernel with its size, the longest unused first."""
    found = [entry for entry in entries() if _chosen(kind) in (None, entry.kind)]
    if as_json:
        write_json(
            {
                "folder": str(cache_dir()),
                "bytes": sum(entry.nbytes for entry in found),
                "entries": [
                    {
                        "kind": entry.kind,
                        "name": entry.name,
                        "bytes": entry.nbytes,
                        "idle_seconds": round(entry.idle_seconds, 1),
                    }
                    for entry in found
                ],
            }
        )
        return
    for entry in found:
        days = entry.idle_seconds / 86400
        sys.stdout.write(
            f"{entry.kind:<8} {size_text(entry.nbytes):>10}  unused for {days:6.1f} days  "
            f"{entry.name}\n"
        )
    total = size_text(sum(entry.nbytes for entry in found))
    sys.stdout.write(f"{len(found)} entries, {total} in {cache_dir()}\n")


@cache_app.command("clear")
def clear_entries(
    kind: Kind = None, as_json: options.Json = False, debug: options.Debug = False
) -> None:
    """Remove images and kernels; they are made again when they are needed."""
    removed, nbytes = clear(_chosen(kind))
    if as_json:
        write_json({"folder": str(cache_dir()), "removed": removed, "bytes": nbytes})
    else:
        sys.stdout.write(f"removed {removed} entries, {size_text(nbytes)} in {cache_dir()}\n")


def size_text(nbytes: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes} B"


def _chosen(kind: str | None) -> str | None:
    if kind is not None and kind not in KINDS:
        raise UsageError(f"--kind takes {' or '.join(KINDS)}, not {kind!r}")
    return kind
