"""The oracle: the plan executed stage by stage and tile by tile in numpy and float32.

Plan + image -> `Backend`. It is written to be read. Every sum over columns is one product of a
matrix and one vector, so that a row's bits do not depend on the rows beside it.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from flashformer.backends.base import Float32, Int32, StepBatch, StepResult
from flashformer.model.spec import LayerSpec
from flashformer.plan.machine import Machine
from flashformer.plan.pack import Image, read_vector, unpack_rows, unpack_tiles
from flashformer.plan.plan import Matrix, Plan
from flashformer.quant.formats import TILE_ROWS

Buffers = dict[str, npt.NDArray[Any]]
Trace = dict[tuple[str, int], npt.NDArray[Any]]

KV_DTYPES: dict[str, npt.DTypeLike] = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}
BIASES = {"qkv": "qkv_bias", "o_proj": "o_bias", "gate_up": "gate_up_bias", "down": "down_bias"}
KEPT_BYTES = 2 << 30  # unpacked weights are kept while all of them together need no more


def reference_machine() -> Machine:
    """The machine of the reference backend; its four CTAs take turns."""
    return Machine(
        kind="reference",
        name="numpy",
        arch="numpy",
        num_ctas=4,
        layout="rows",
        page_tokens=16,
        kv_format="f32",
        max_rows=64,
    )


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """RMSNorm (arXiv 1910.07467) over the last axis: x / sqrt(mean(x^2) + eps) times weight."""
    mean = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
    return np.asarray(x / np.sqrt(mean + np.float32(eps)) * weight, np.float32)


def rotate(heads: Float32, angles: Float32, factor: float) -> Float32:
    """RoPE of [rows, heads, head_dim] by `angles` [rows, rotary_dim / 2]; halves paired.

    cos and sin are multiplied by `factor`; channels beyond rotary_dim stay as they are.
    """
    half = angles.shape[1]
    cos = (np.cos(angles) * np.float32(factor))[:, None]
    sin = (np.sin(angles) * np.float32(factor))[:, None]
    first, second = heads[..., :half], heads[..., half : 2 * half]
    rotated = [first * cos - second * sin, second * cos + first * sin, heads[..., 2 * half :]]
    return np.concatenate(rotated, axis=-1)


def silu(x: Float32) -> Float32:
    """SiLU: x / (1 + e^-x)."""
    with np.errstate(over="ignore"):  # e^-x = inf gives the right limit, -0
        return np.asarray(x / (np.float32(1) + np.exp(-x)), np.float32)


def softmax(scores: Float32) -> Float32:
    """Over the last axis, stable."""
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    exponentials /= exponentials.sum(axis=-1, keepdims=True)
    result: Float32 = exponentials
    return result


class ReferenceBackend:
    """A plan of any machine, run in numpy.

    With `trace` set to a dict, every step stores there what each stage wrote: (stage name, layer)
    -> a copy of the buffer, float32 [rows, width]; of gate_up the product of the pair, of lm_head
    the logits of the rows that want them.
    """

    def __init__(self, plan: Plan, image: Image, num_pages: int) -> None:
        self.trace: Trace | None = None
        self._plan = plan
        self._image = image
        self._num_pages = num_pages
        dtype = KV_DTYPES[plan.machine.kv_format]
        page = (num_pages, plan.machine.page_tokens)
        shapes = [(2, *page, la.num_kv_heads, la.head_dim) for la in plan.spec.layers]
        self._kv = [np.zeros(shape, dtype) for shape in shapes]  # keys, values
        self._keeps = 4 * sum(m.num_tiles * TILE_ROWS * m.cols for m in plan.matrices) < KEPT_BYTES
        self._kept: dict[tuple[str, int, int], Float32] = {}

    @property
    def plan(self) -> Plan:
        """The plan it runs."""
        return self._plan

    @property
    def num_pages(self) -> int:
        """KV pages that exist."""
        return self._num_pages

    def step(self, batch: StepBatch) -> StepResult:
        """Run the rows through the stages of the plan."""
        buffers: Buffers = {}
        for stage in self._plan.stages:
            STAGES[stage.name](self, stage.layer, batch, buffers)
            if self.trace is not None:
                self.trace[stage.name, stage.layer] = buffers[stage.writes[-1]].copy()
        return StepResult(buffers["logits"], buffers["argmax"])

    def close(self) -> None:
        """Free the keys, the values and the unpacked weights."""
        self._kv.clear()
        self._kept.clear()

    def _embed(self, layer: int, batch: StepBatch, buffers: Buffers) -> None:
        tied = self._plan.spec.tie_word_embeddings
        matrix = self._plan.matrix("lm_head" if tied else "embed_tokens")
        buffers["hidden"] = unpack_rows(self._plan, self._image, matrix, batch.token_ids)

    def _qkv(self, layer: int, batch: StepBatch, buffers: Buffers) -> None:
        x = self._norm(buffers["hidden"], "input_layernorm", layer)
        buffers["qkv"] = self._project("qkv", layer, x)[:, : self._plan.spec.layers[layer].qkv_rows]

    def _attention(self, layer: int, batch: StepBatch, buffers: Buffers) -> None:
        record = self._plan.spec.layers[layer]
        q, k, v = self._heads(layer, buffers["qkv"], batch.positions)
        page_tokens = self._plan.machine.page_tokens
        pages = batch.page_table[batch.slots, batch.positions // page_tokens]
        self._kv[layer][0, pages, batch.positions % page_tokens] = k
        self._kv[layer][1, pages, batch.positions % page_tokens] = v
        attended = np.empty((len(q), record.q_rows), np.float32)
        for row, (slot, position) in enumerate(zip(batch.slots, batch.positions, strict=True)):
            attended[row] = self._attend(layer, q[row], batch.page_table[slot], int(position))
        buffers["attended"] = attended

    def _o_proj(self, layer: int, batch: StepBatch, buffers: Buffers) -> None:
        self._add(buffers, self._project("o_proj", layer, buffers["attended"]))

    def _gate_up(self, layer: int, batch: StepBatch, buffers: Buffers) -> None:
        x = self._norm(buffers["hidden"], "post_attention_layernorm", layer)
        pairs = self._project("gate_up", layer, x).reshape(len(x), -1, 2, TILE_ROWS // 2)
        by_rows = self._plan.matrix("gate_up", layer).places
        activated = (silu(pairs[:, :, 0]) * pairs[:, :, 1])[:, by_rows].reshape(len(x), -1)
        buffers["activated"] = activated[:, : self._plan.spec.layers[layer].intermediate_size]

    def _down(self, layer: int, batch: StepBatch, buffers: Buffers) -> None:
        self._add(buffers, self._project("down", layer, buffers["activated"]))

    def _lm_head(self, layer: int, batch: StepBatch, buffers: Buffers) -> None:
        x = self._norm(buffers["hidden"][batch.logit_rows], "norm", -1)
        buffers["logits"] = self._project("lm_head", -1, x)[:, : self._plan.spec.vocab_size]

    def _sample(self, layer: int, batch: StepBatch, buffers: Buffers) -> None:
        logits = buffers["logits"]
        best = np.where(np.isnan(logits).any(axis=1), -1, logits.argmax(axis=1))
        buffers["argmax"] = best.astype(np.int32)

    def _norm(self, x: Float32, name: str, layer: int) -> Float32:
        weight = read_vector(self._image, self._plan.vector(name, layer))
        return rms_norm(x, weight, self._plan.spec.rms_norm_eps)

    def _project(self, name: str, layer: int, x: Float32) -> Float32:
        """The matrix times every row of `x`, plus its bias: [rows, 16 x tiles], rows as stored."""
        matrix = self._plan.matrix(name, layer)
        result = np.empty((len(x), matrix.num_tiles * TILE_ROWS), np.float32)
        for cta in range(self._plan.machine.num_ctas):
            weights = self._cta_weights(matrix, cta)
            first, end = (TILE_ROWS * tile for tile in matrix.first_tile[cta : cta + 2])
            for row in range(len(x)):
                result[row, first:end] = weights @ x[row]
        for vector in self._plan.vectors:
            if vector.name == BIASES.get(name) and vector.layer == layer:
                result += read_vector(self._image, vector)
        return result

    def _cta_weights(self, matrix: Matrix, cta: int) -> Float32:
        """The tiles of one CTA as float32 [16 x tiles, cols]."""
        key = (matrix.name, matrix.layer, cta)
        if key in self._kept:
            return self._kept[key]
        first, end = matrix.first_tile[cta : cta + 2]
        weights = unpack_tiles(self._plan, self._image, matrix, first, end)
        if self._keeps:
            self._kept[key] = weights
        return weights

    def _heads(
        self, layer: int, qkv: Float32, positions: Int32
    ) -> tuple[Float32, Float32, Float32]:
        """Queries, keys and values [rows, heads, head_dim] after QK-norm and RoPE."""
        record = self._plan.spec.layers[layer]
        ends = [record.q_rows, record.q_rows + record.kv_rows]
        parts = np.split(qkv, ends, axis=1)
        q, k, v = (part.reshape(len(qkv), -1, record.head_dim) for part in parts)
        if record.qk_norm:
            q = self._norm(q, "q_norm", layer)
            k = self._norm(k, "k_norm", layer)
        if record.rope_idx >= 0:
            inv_freq = read_vector(self._image, self._plan.vector("inv_freq", record.rope_idx))
            angles = positions.astype(np.float32)[:, None] * inv_freq
            factor = self._plan.attention_factors[record.rope_idx]
            q, k = rotate(q, angles, factor), rotate(k, angles, factor)
        return q, k, v

    def _attend(self, layer: int, q: Float32, pages: Int32, position: int) -> Float32:
        """Attention of one row's queries [heads, head_dim] over its sequence: [q_rows]."""
        record = self._plan.spec.layers[layer]
        start = _first_position(record, position)
        page_tokens = self._plan.machine.page_tokens
        seen = np.arange(start, position + 1)
        past = self._kv[layer][:, pages[seen // page_tokens], seen % page_tokens]
        keys, values = past.astype(np.float32).transpose(0, 2, 1, 3)  # [kv heads, positions, dim]
        grouped = q.reshape(record.num_kv_heads, -1, record.head_dim)
        scores = grouped @ keys.transpose(0, 2, 1) * np.float32(record.attention_scale)
        attended: Float32 = (softmax(scores) @ values).reshape(-1)
        return attended

    @staticmethod
    def _add(buffers: Buffers, update: Float32) -> None:
        hidden = buffers["hidden"]
        buffers["hidden"] = hidden + update[:, : hidden.shape[1]]


def _first_position(record: LayerSpec, position: int) -> int:
    """The earliest position that a row at `position` sees."""
    return max(0, position - record.window + 1) if record.window else 0


StageFunction = Callable[[ReferenceBackend, int, StepBatch, Buffers], None]
STAGES: dict[str, StageFunction] = {
    "embed": ReferenceBackend._embed,
    "qkv": ReferenceBackend._qkv,
    "attention": ReferenceBackend._attention,
    "o_proj": ReferenceBackend._o_proj,
    "gate_up": ReferenceBackend._gate_up,
    "down": ReferenceBackend._down,
    "lm_head": ReferenceBackend._lm_head,
    "sample": ReferenceBackend._sample,
}
