"""How much memory a plan needs, foreseen before any of it is allocated, and how much there is.

Plan + number of KV pages -> `MemoryReport`, or `OutOfMemoryError` with the option that fits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from flashformer.errors import OutOfMemoryError
from flashformer.plan.plan import Plan, PlanOptions, make_plan

_ROOT = Path("/")
_SHORTEST = 512  # tokens; a smaller context is not proposed


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes that a loaded model holds."""

    image_bytes: int  # the packed weights
    kv_bytes: int  # all KV pages; on a CPU the system provides them when they are first written
    kv_bytes_per_token: int
    context: int  # tokens of one sequence
    max_batch: int
    available_bytes: int | None  # before loading; None where the system does not tell

    @property
    def total_bytes(self) -> int:
        """Weights and KV pages."""
        return self.image_bytes + self.kv_bytes


def pages_of(plan: Plan) -> int:
    """KV pages that let every sequence of the batch fill the context."""
    return plan.options.max_batch * -(-plan.options.context // plan.machine.page_tokens)


def report_memory(plan: Plan, num_pages: int, available_bytes: int | None) -> MemoryReport:
    """What `plan` with `num_pages` KV pages needs."""
    return MemoryReport(
        image_bytes=plan.image_bytes,
        kv_bytes=num_pages * plan.machine.page_tokens * plan.kv_bytes_per_token,
        kv_bytes_per_token=plan.kv_bytes_per_token,
        context=plan.options.context,
        max_batch=plan.options.max_batch,
        available_bytes=available_bytes,
    )


def require_memory(plan: Plan, available_bytes: int | None) -> MemoryReport:
    """The report of a plan with all its pages; `OutOfMemoryError` if that is too much."""
    report = report_memory(plan, pages_of(plan), available_bytes)
    if available_bytes is None or report.total_bytes <= available_bytes:
        return report
    options = plan.options
    raise OutOfMemoryError(
        f"the model needs {_gib(report.total_bytes)} ({_gib(report.image_bytes)} of weights in "
        f"{options.format} and {_gib(report.kv_bytes)} of keys and values for {options.max_batch} "
        f"sequences of {options.context} tokens), but {_gib(available_bytes)} of memory are "
        f"available; {_proposal(plan, available_bytes)}."
    )


def available_memory(root: Path = _ROOT) -> int | None:
    """Bytes that this process may still use: free memory, within its cgroups' limits."""
    limits = [_mem_available(root), *_cgroup_rooms(root)]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _proposal(plan: Plan, available_bytes: int) -> str:
    for words, options in _smaller(plan, available_bytes):
        smaller = make_plan(plan.spec, plan.machine, options)
        need = report_memory(smaller, pages_of(smaller), None).total_bytes
        if need <= available_bytes:
            return f"{words} fits ({_gib(need)})"
    return "no option of this model fits, so choose a smaller model"


def _smaller(plan: Plan, available_bytes: int) -> Iterator[tuple[str, PlanOptions]]:
    """What to try, the smallest loss first."""
    options = plan.options
    page = plan.machine.page_tokens
    room = (available_bytes - plan.image_bytes) // max(plan.kv_bytes_per_token, 1)
    context = room // options.max_batch // page * page
    if _SHORTEST <= context < options.context:
        yield f"context={context}", replace(options, context=context)
    if options.max_batch > 1:
        yield "max_batch=1", replace(options, max_batch=1)
    context = min(options.context, _SHORTEST)
    for name in ("int8", "int4"):
        coded = replace(options, format=name, head_format=name)
        yield f"quant={name!r}", coded
        yield (
            f"quant={name!r} with max_batch=1 and context={context}",
            replace(coded, max_batch=1, context=context),
        )


def _mem_available(root: Path) -> int | None:
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """What each cgroup above this process leaves; its file cache counts as free."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / place.strip("/")
        for group in (folder, *folder.parents):
            if group == base.parent:
                break
            limit, used = _text(group / names[0]).strip(), _text(group / names[1]).strip()
            if limit.isdigit() and used.isdigit():
                yield max(0, int(limit) - int(used) + _stat(group / "memory.stat", names[2]))


def _stat(path: Path, name: str) -> int:
    fields = (line.split() for line in _text(path).splitlines())
    return next((int(field[1]) for field in fields if field[:1] == [name]), 0)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
