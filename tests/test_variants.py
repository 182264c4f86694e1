"""The laboratory's tool: what it is told, and whose files it compiles."""

import shutil
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from flashformer.backends.cuda.compile import KERNEL
from test_cuda_compile import plan_for
from variants import Model, Variant, cubin


def test_a_model_is_a_shape_with_formats_and_a_context():
    assert Model.of("llama-3.2-1b") == Model("llama-3.2-1b")
    assert Model.of("llama-3.1-8b/int4g128/int8:4096") == Model(
        "llama-3.1-8b", "int4g128", "int8", 4096
    )


@pytest.mark.parametrize("text", ["llama-9", "llama-3.2-1b/int8", "llama-3.2-1b:many"])
def test_what_is_no_model_is_refused(text):
    with pytest.raises(ArgumentTypeError, match="SHAPE"):
        Model.of(text)


@pytest.mark.parametrize("text", ["/no/such/folder", ".@6", ".@a-b"])
def test_what_is_no_variant_is_refused(text):
    with pytest.raises(ArgumentTypeError, match="FOLDER"):
        Variant.of(text)


def test_a_variant_s_files_take_the_place_of_the_kernel_s(tmp_path):
    plan = plan_for("sm_90a", "llama-3.2-1b")
    for name in ("decode.cu", "philox.cuh"):
        shutil.copy(KERNEL / name, tmp_path)
    philox = tmp_path / "philox.cuh"
    same = cubin(plan, Variant.of(str(tmp_path)))
    assert same.code == cubin(plan, Variant(Path())).code

    philox.write_text(philox.read_text().replace("0xD2511F53", "0xD2511F55"))
    assert cubin(plan, Variant.of(f"{tmp_path}@6-3")).code != same.code
