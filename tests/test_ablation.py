"""Every variant of the kernel with an idea taken out still compiles with the kernel of today."""

import numpy as np
import pytest

from ablation import FFMA, VARIANTS, WHOLE, is_right, variant_cubin
from flashformer.backends.cuda.machine import Device, fit_machine
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.plan.plan import PlanOptions, make_plan


def test_every_variant_compiles_without_spills_and_is_another_kernel():
    spec = ModelSpec.from_hf({**SHAPES["llama-3.2-1b"], "num_hidden_layers": 2})
    device = Device("H200", 9, 0, 132, 227 << 10, cooperative=True)
    plan = make_plan(spec, fit_machine(device, spec), PlanOptions(context=256, max_batch=1))
    cubins = [variant_cubin(plan, told) for told in dict.fromkeys(VARIANTS.values())]
    assert all(cubin.resources.spill_bytes == 0 for cubin in cubins)
    assert len({cubin.code for cubin in cubins}) == len(cubins) > 3


@pytest.mark.parametrize(("name", "right"), [(WHOLE, False), (FFMA, True)])
def test_only_sums_in_another_order_may_change_bits(name, right):
    tokens, logits = np.arange(4, dtype=np.int32), np.linspace(-1, 1, 50, dtype=np.float32)
    near = logits + np.float32(1e-4)
    assert is_right(name, (tokens, logits), (tokens, logits), 0.1)
    assert is_right(name, (tokens, near), (tokens, logits), 0.1) is right
    assert not is_right(name, (tokens, logits[::-1]), (tokens, logits), 0.1)
