"""Random weights that are made in place: every code valid, every format's weights equally large."""

import numpy as np
import pytest
import torch

from flashformer.backends.cuda.random_image import WEIGHT_STD, fill_tiles
from flashformer.backends.reference import reference_machine
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.plan.pack import unpack
from flashformer.plan.plan import PlanOptions, make_plan
from flashformer.quant.formats import CHOICES

SIZES = {"num_hidden_layers": 1, "vocab_size": 517, "hidden_size": 576, "intermediate_size": 1000}


@pytest.mark.parametrize("name", [name for name in CHOICES if name != "f32"])
def test_the_weights_of_every_format_are_finite_and_of_the_size_that_was_meant(name):
    spec = ModelSpec.from_hf({**SHAPES["smollm2-135m"], **SIZES})
    plan = make_plan(spec, reference_machine(), PlanOptions(name, name, 64, 1))
    image = torch.full((plan.image_bytes,), 255, dtype=torch.uint8)
    random = torch.Generator().manual_seed(1)
    for matrix in plan.matrices:
        tiles = image[matrix.offset : matrix.offset + matrix.nbytes]
        fill_tiles(tiles.view(matrix.num_tiles, matrix.tile_bytes), matrix, random)
        values = unpack(plan, image.numpy(), matrix)
        # 10^5 weights and more: their measured deviation is within 1 %, that of a format's codes
        # (FP8_STD is one digit) within 5 %.
        assert np.isfinite(values).all()
        assert float(values.std()) == pytest.approx(WEIGHT_STD, rel=0.05)
        if name == "int8":
            stored = tiles.view(matrix.num_tiles, -1)[:, : -(16 * 4)]
            assert not (stored.view(torch.int8) == -128).any()
