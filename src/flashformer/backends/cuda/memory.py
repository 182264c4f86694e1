"""GPU memory foreseen before any of it is taken: what a plan needs, and what would fit.

Plan + KV pages -> `Need`, or `OutOfMemoryError` with the numbers and the option that fits
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from flashformer.backends.cuda.choices import choice_bytes, row_stride
from flashformer.backends.cuda.prefill import workspace_bytes
from flashformer.codegen.exchange import exchange_bytes, padded
from flashformer.errors import OutOfMemoryError
from flashformer.plan.plan import Plan, PlanOptions
from flashformer.plan.planner import longest_context

SHORTEST = 512  # tokens; a smaller context is not proposed


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of GPU memory of a loaded model."""

    weights: int
    past: int  # keys and values
    prompts: int  # workspace of reading a prompt
    hand_offs: int  # exchange and logits

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.past + self.prompts + self.hand_offs


def need_of(plan: Plan, num_pages: int) -> Need:
    """What `plan` needs with so many KV pages."""
    logits = plan.machine.max_rows * row_stride(plan) * 4
    return Need(
        weights=plan.image_bytes,
        past=num_pages * plan.machine.page_tokens * past_bytes_per_token(plan),
        prompts=workspace_bytes(plan),
        hand_offs=exchange_bytes(plan)[1] + logits + choice_bytes(plan),
    )


def past_bytes_per_token(plan: Plan) -> int:
    """Of the keys and values of one position as the pages hold them, padding included."""
    layers = plan.spec.layers
    return sum(2 * layer.num_kv_heads * padded(layer.head_dim) * 2 for layer in layers)


def pages_of(plan: Plan) -> int:
    """KV pages that let every sequence of the batch fill the context."""
    return plan.options.max_batch * -(-plan.options.context // plan.machine.page_tokens)


def require_gpu_memory(plan: Plan, num_pages: int, free: int) -> None:
    """Refuse a plan that `free` bytes cannot hold, and say which option would fit."""
    need = need_of(plan, num_pages)
    if need.total <= free:
        return
    options = plan.options
    raise OutOfMemoryError(
        f"the model needs {_gib(need.total)} of GPU memory ({_gib(need.weights)} of weights in "
        f"{options.format}, {_gib(need.past)} of keys and values for {options.max_batch} sequences "
        f"of {options.context} tokens, {_gib(need.prompts)} for reading prompts), but "
        f"{_gib(free)} are free; {_proposal(plan, free)}"
    )


def fitting_context(plan: Plan, free: int) -> int:
    """The longest context, in whole pages, that `free` bytes hold for the plan's batch; 0: none."""
    page = plan.machine.page_tokens
    low, high = 0, -(-longest_context(plan.spec) // page)
    while low < high:
        middle = (low + high + 1) // 2
        longer = _with(plan, context=middle * page)
        if need_of(longer, pages_of(longer)).total <= free:
            low = middle
        else:
            high = middle - 1
    return min(low * page, longest_context(plan.spec))


def _proposal(plan: Plan, free: int) -> str:
    for words, smaller in _smaller(plan, free):
        need = need_of(smaller, pages_of(smaller)).total
        if need <= free:
            return f"{words} fits ({_gib(need)})"
    return "no option of this model fits, so choose a smaller model or a GPU with more memory"


def _smaller(plan: Plan, free: int) -> Iterator[tuple[str, Plan]]:
    """What to try, the smallest loss first."""
    context = fitting_context(plan, free)
    if SHORTEST <= context < plan.options.context:
        yield f"context={context}", _with(plan, context=context)
    if plan.options.max_batch > 1:
        yield "max_batch=1", _with(plan, max_batch=1)
        context = fitting_context(_with(plan, max_batch=1), free)
        if SHORTEST <= context < plan.options.context:
            yield f"max_batch=1 with context={context}", _with(plan, max_batch=1, context=context)


def _with(plan: Plan, **changes: int) -> Plan:
    options: PlanOptions = replace(plan.options, **changes)  # type: ignore[arg-type]
    return replace(plan, options=options)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
