"""GPU memory is foreseen: what does not fit is refused with the numbers and what would fit."""

import re

import pytest

from flashformer.backends.cuda.machine import Device, fit_machine
from flashformer.backends.cuda.memory import (
    fitting_context,
    need_of,
    pages_of,
    require_gpu_memory,
)
from flashformer.errors import OutOfMemoryError
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.plan.plan import PlanOptions, make_plan

GIB = 2**30
H200 = Device("H200", 9, 0, 132, 227 << 10, cooperative=True)


def plan_of(shape="llama-3.1-8b", context=8192, batch=8):
    spec = ModelSpec.from_hf(SHAPES[shape])
    options = PlanOptions("bf16", "bf16", context, batch)
    return make_plan(spec, fit_machine(H200, spec), options)


def test_a_model_that_fits_is_not_refused_and_one_byte_less_is():
    plan = plan_of()
    total = need_of(plan, pages_of(plan)).total
    assert total > plan.image_bytes + 8 * 8192 * 131072  # bytes of an 8B model's position
    require_gpu_memory(plan, pages_of(plan), total)
    with pytest.raises(OutOfMemoryError, match="fits"):
        require_gpu_memory(plan, pages_of(plan), total - 1)


@pytest.mark.parametrize("free", [20, 24, 28])
@pytest.mark.parametrize("batch", [1, 8])
def test_the_context_that_is_proposed_fits_and_one_more_page_does_not(free, batch):
    plan = plan_of(context=131072, batch=batch)
    with pytest.raises(OutOfMemoryError) as caught:
        require_gpu_memory(plan, pages_of(plan), free * GIB)

    found = re.search(r"context=(\d+) fits", str(caught.value))
    assert found, caught.value
    context = int(found[1])
    smaller = plan_of(context=context, batch=batch)
    assert need_of(smaller, pages_of(smaller)).total <= free * GIB
    larger = plan_of(context=context + smaller.machine.page_tokens, batch=batch)
    assert need_of(larger, pages_of(larger)).total > free * GIB


def test_weights_that_do_not_fit_alone_are_refused_without_a_false_promise():
    plan = plan_of()
    with pytest.raises(OutOfMemoryError, match="choose a smaller model"):
        require_gpu_memory(plan, pages_of(plan), 10 * GIB)
    assert fitting_context(plan, 10 * GIB) == 0


def test_a_card_with_room_holds_the_model_s_whole_context():
    plan = plan_of(batch=1)
    assert fitting_context(plan, 140 * GIB) == 131072
