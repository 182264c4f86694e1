"""A prompt's attention in blocks is its attention in one piece."""

import pytest
import torch

from flashformer.backends.cuda.prefill_attention import (
    attend,
    attend_in_blocks,
    blocks_are_fast,
    past_blocks,
)
from flashformer.backends.cuda.prefill_ops import TorchOps

ROWS, Q_HEADS, KV_HEADS, CHANNELS = 16, 6, 2, 32
SCALE = 0.3  # sharp: some rows look at one position alone
BF16 = 2.0**-8  # half the distance of neighbouring bf16 numbers, relative to them


@pytest.mark.parametrize("chunks", range(20))
def test_blocks_of_the_past_touch_and_have_few_sizes(chunks):
    blocks = list(past_blocks(chunks * ROWS, ROWS))

    ends = [end for _, end in blocks]
    assert [0, *ends] == [*(begin for begin, _ in blocks), chunks * ROWS]
    sizes = [(end - begin) // ROWS for begin, end in blocks]
    assert sizes == sorted(set(sizes), reverse=True)
    assert all(size & (size - 1) == 0 for size in sizes)


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 6, 8])
def test_blocks_and_one_piece_agree(chunks):
    torch.manual_seed(chunks)
    query = torch.randn(ROWS, Q_HEADS, CHANNELS)
    keys, values = torch.randn(2, chunks * ROWS, KV_HEADS, CHANNELS)

    found = attend_in_blocks(query, keys, values, SCALE, TorchOps(CHANNELS, 1e-5))

    expected = attend(query, keys, values, SCALE, 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # float32, another order


@pytest.mark.gpu
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_blocks_of_a_gpu_are_as_close_to_float32_as_one_piece(chunks):
    torch.manual_seed(chunks)
    rows, shape = 512, (chunks * 512, 8, 128)
    query = torch.randn(rows, 32, 128, device="cuda", dtype=torch.bfloat16)
    keys, values = torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16)
    if not blocks_are_fast(query, keys[:rows]):
        pytest.skip("cuDNN's attention does not run on this GPU")
    exact = attend(*(x.float().cpu() for x in (query, keys, values)), 128**-0.5, 0)

    found = attend_in_blocks(query, keys, values, 128**-0.5, TorchOps(128, 1e-5))

    error = (found.float().cpu() - exact).abs().amax()
    # Weights are rounded to bf16 before they multiply values, each block's result and each blend.
    assert 0 < error <= (2 + chunks) * BF16 * values.abs().max()
