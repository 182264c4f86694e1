"""Whether a prompt's logits, and what the kernel makes of its keys and values, are exact enough.

Backend + image + config.json -> divergences from float32, beside that of transformers in bf16

A random network of a real shape carries rounding from layer to layer: behind the 32 layers of an 8B
shape, two right computations in bf16 differ by a quarter of the logits' spread. So what counts is
the distance from float32, and the yardstick is that of another computation in bf16.
"""

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flashformer.backends.base import Backend, Float32, Int32
from flashformer.backends.cuda.unpack import padded_cols, unpack
from flashformer.model.roles import locate, role_shape
from flashformer.plan.plan import Matrix, Plan
from flashformer.quant.formats import TILE_ROWS
from flashformer.serve.benchmark.steps import Steps

PROMPT_TOKENS = 96
TOKENS_BEHIND = 8  # by the kernel: one step
ALLOWED = 1.05  # of the divergence of transformers in bf16
ROLES = {  # of the rows of a matrix; of others the name is the role
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


def checks(
    backend: Backend, steps: Steps, image: torch.Tensor, config: dict[str, Any]
) -> dict[str, Any]:
    """Mean Kullback-Leibler divergences from float32, and what must hold of them."""
    ids = steps.random_ids(PROMPT_TOKENS + TOKENS_BEHIND)
    prompt, again = (logits(steps, 0, ids[:PROMPT_TOKENS], PROMPT_TOKENS) for _ in range(2))
    behind = logits(steps, 0, ids[PROMPT_TOKENS:], TOKENS_BEHIND, PROMPT_TOKENS)
    kernel = logits(steps, 1, ids, backend.plan.machine.max_rows)
    rounded, exact = twin_logits(backend.plan, image, config, ids)
    before, after = slice(PROMPT_TOKENS), slice(PROMPT_TOKENS, None)
    found = {
        "prompt": divergence(prompt, exact[before]),
        "prompt_by_transformers": divergence(rounded[before], exact[before]),
        "behind": divergence(behind, exact[after]),
        "behind_by_transformers": divergence(rounded[after], exact[after]),
        "by_the_kernel": divergence(kernel, exact),
    }
    same_bits = prompt.tobytes() == again.tobytes()
    close = all(found[n] <= ALLOWED * found[f"{n}_by_transformers"] for n in ("prompt", "behind"))
    return {
        "passed": same_bits and close,
        "repeat_bit_equal": same_bits,
        "divergence": found,
        "allowed": ALLOWED,
    }


def logits(steps: Steps, slot: int, ids: Int32, rows: int, first: int = 0) -> Float32:
    """Of every position from `first` on, `rows` of them a step."""
    found = []
    for start in range(0, len(ids), rows):
        part = ids[start : start + rows]
        at = np.arange(len(part), dtype=np.int32)
        slots = np.full(len(part), slot, np.int32)
        positions = at + np.int32(first + start)
        found.append(steps.rows(part, positions, slots, at).logits.copy())
    return np.concatenate(found)


def divergence(found: Float32, exact: Float32) -> float:
    """Mean over the rows, in float64; NaN if a logit is."""
    total = 0.0
    for row, reference in zip(found, exact, strict=True):
        q, p = (
            torch.log_softmax(torch.from_numpy(x).to(torch.float64), -1) for x in (row, reference)
        )
        total += float((p.exp() * (p - q)).sum())
    return total / len(exact)


@torch.inference_mode()
def twin_logits(
    plan: Plan, image: torch.Tensor, config: dict[str, Any], ids: Int32
) -> tuple[Float32, Float32]:
    """Logits of all rows by transformers' own model with the image's weights: bf16, float32."""
    with image.device:
        made = AutoConfig.for_model(**config)
        model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
        tokens = torch.from_numpy(ids).to(image.device, torch.int64)[None]
    fill(model, plan, image)
    rounded = model(tokens).logits[0].float().cpu().numpy()
    exact = model.float()(tokens).logits[0].cpu().numpy()
    return rounded, exact


def fill(model: torch.nn.Module, plan: Plan, image: torch.Tensor) -> None:
    """Put the image's matrices into the parameters; norms of ones and no biases are theirs."""
    parameters = dict(model.named_parameters())
    for matrix in plan.matrices:
        rows = rows_of(matrix, image)
        roles = ROLES.get(matrix.name, (matrix.name,))
        for role in roles:
            size = role_shape(plan.spec, role, matrix.layer)[0]
            part = locate(plan.spec, role, matrix.layer)
            parameters[part.name][part.first_row : part.first_row + size].copy_(rows[:size])
            rows = rows[size:]


def rows_of(matrix: Matrix, image: torch.Tensor) -> torch.Tensor:
    """A matrix of the image as rows in the order of its roles, not of its tiles."""
    tiles = image[matrix.offset : matrix.offset + matrix.nbytes].view(-1, matrix.tile_bytes)
    shape = (len(tiles) * TILE_ROWS, padded_cols(matrix.weight_format, matrix.cols))
    out = torch.empty(shape, dtype=torch.bfloat16, device=image.device)
    unpack(tiles, matrix.weight_format, out)
    if matrix.name == "gate_up":  # a tile holds 8 rows of gate, then 8 of up
        by_rows = torch.as_tensor(matrix.places, device=image.device)
        halves = out.view(len(tiles), 2, TILE_ROWS // 2, -1)[by_rows].transpose(0, 1)
        out = halves.reshape(2, -1, shape[1])[:, : matrix.rows // 2].flatten(0, 1)
    return out[: matrix.rows, : matrix.cols]
