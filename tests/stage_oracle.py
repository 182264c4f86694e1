"""What each stage of the CUDA kernel must leave in the exchange, given what it found there.

Every stage is computed in float64 from the kernel's own inputs, so that a bound covers one stage
alone: a product that passes through n additions in float32 carries at most n * 2^-23 of itself
(Higham 2002, section 3; tensor cores cut off instead of rounding, hence 23 and not 24), a value
stored in 16 bits half a spacing, and one that carries a tag a whole spacing more.
"""

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from flashformer.backends.base import StepBatch
from flashformer.codegen.cuda_header import F16_EXCHANGE_SCALE
from flashformer.plan.pack import read_vector, unpack_rows, unpack_tiles
from flashformer.quant.formats import TILE_ROWS

FLOAT = 2.0**-23  # of a float32 sum, a term and an addition
SCALAR = 2.0**-19  # of what a few float32 operations and rsqrt, exp, sin or cos make
ROUNDING = {"bf16": 2.0**-8, "f16": 2.0**-11}  # half the spacing of 16-bit floats
TINY = 2.0**-24  # half the spacing of subnormal fp16
BIASES = {"qkv": "qkv_bias", "o_proj": "o_bias", "gate_up": "gate_up_bias", "down": "down_bias"}


@dataclass(frozen=True)
class Value:
    """A result and how far the kernel may be from it."""

    exact: np.ndarray
    bound: np.ndarray


def depth(cols):
    """Additions that a product passes through: one warp's share of the columns, then the rest."""
    return cols / 128 + 32


def to_bf16(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def integers(x):
    """Activations as the kernel multiplies them with int8 and int4: of 128 columns the largest is
    at least 2^13 units and less than 2^14 (kernel/format.cuh)."""
    groups = np.pad(x, ((0, 0), (0, -x.shape[1] % 128))).reshape(len(x), -1, 128)
    largest = np.abs(groups).max(2, keepdims=True)
    unit = np.exp2(np.floor(np.log2(np.where(largest > 0, largest, 1))) - 13)
    return (np.rint(groups / unit) * unit).reshape(len(x), -1)[:, : x.shape[1]]


@dataclass
class StageOracle:
    """Follows one backend through its steps; `hidden` is the residual stream of the step."""

    plan: object
    image: np.ndarray
    past: dict = field(
        default_factory=dict
    )  # (layer, slot) -> positions of (key, its bound, value)

    def __post_init__(self):
        self.spec = self.plan.spec
        f16 = self.plan.options.format == "f16"
        self.u = ROUNDING["f16" if f16 else "bf16"]
        self.stored_as = np.float16 if f16 else ml_dtypes.bfloat16
        self.scale = F16_EXCHANGE_SCALE if f16 else 1.0
        self.unpacked = {}

    def vector(self, name, layer=-1):
        return read_vector(self.image, self.plan.vector(name, layer)).astype(np.float64)

    def bias(self, name, layer, rows):
        found = [v for v in self.plan.vectors if v.name == BIASES.get(name) and v.layer == layer]
        return read_vector(self.image, found[0]).astype(np.float64) if found else np.zeros(rows)

    def product(self, name, layer, x):
        """W x without bias, and the bound of its sums: [rows, 16 x tiles] each."""
        matrix = self.plan.matrix(name, layer)
        if not matrix.weight_format.floating:
            x = integers(x)
        w, sizes = self.weights(matrix)
        return x @ w.T, depth(matrix.cols) * FLOAT * (np.abs(x) @ sizes.T)

    def weights(self, matrix):
        """A matrix and its magnitudes: float64 [16 x tiles, cols], unpacked once."""
        key = matrix.name, matrix.layer
        if key not in self.unpacked:
            w = unpack_tiles(self.plan, self.image, matrix, 0, matrix.num_tiles).astype(np.float64)
            self.unpacked[key] = w, np.abs(w)
        return self.unpacked[key]

    def normed(self, name, layer, x, rstd):
        """A matrix behind a norm: the factor 1 / rms is applied to the sums."""
        total, error = self.product(name, layer, x)
        total, error = total * rstd[:, None], error * rstd[:, None]
        exact = total + self.bias(name, layer, total.shape[1])
        return Value(exact, error + SCALAR * np.abs(total) + 2 * FLOAT * np.abs(exact))

    def rstd(self, squares):
        mean = squares.astype(np.float64).sum(1) / self.spec.hidden_size
        return 1 / np.sqrt(mean + self.spec.rms_norm_eps) / self.scale

    def stored(self, value):
        """The bound of a value that has become 16 bits, one in eight of them with a tag."""
        size = np.abs(value.exact) + value.bound
        return Value(value.exact, value.bound + 3 * self.u * size + 3 * TINY)

    def embed(self, tokens):
        """The step's residual stream, and the first layer's input as the kernel stores it."""
        tied = self.spec.tie_word_embeddings
        matrix = self.plan.matrix("lm_head" if tied else "embed_tokens")
        rows = unpack_rows(self.plan, self.image, matrix, np.asarray(tokens))
        rows = rows[:, : self.spec.hidden_size].astype(np.float32)
        weight = read_vector(self.image, self.plan.vector("input_layernorm", 0))
        x = (rows * (weight * np.float32(self.scale))).astype(self.stored_as).astype(np.float64)
        self.hidden = Value(rows.astype(np.float64), np.zeros(rows.shape))
        return x, self.rstd(rows.astype(np.float64) ** 2)

    def add(self, name, layer, x):
        """o_proj and down: into the residual stream, which travels."""
        total, error = self.product(name, layer, x)
        size = self.spec.hidden_size
        exact = self.hidden.exact + (total + self.bias(name, layer, total.shape[1]))[:, :size]
        bound = self.hidden.bound + error[:, :size] + 3 * FLOAT * np.abs(exact)
        self.hidden = Value(exact, bound)
        return self.stored(Value(exact * self.scale, bound * self.scale))

    def input(self, norm, layer, hidden):
        """The input of a matrix behind `norm`, and 1 / rms, from the hidden state as it travels."""
        weight = read_vector(self.image, self.plan.vector(norm, layer))
        x = (hidden.astype(np.float32) * weight).astype(self.stored_as).astype(np.float64)
        return x, self.rstd((hidden / self.scale) ** 2)

    def gate_up(self, layer, x, rstd):
        pair = self.normed("gate_up", layer, x, rstd)
        shape = (len(x), -1, 2, TILE_ROWS // 2)
        by_rows = self.plan.matrix("gate_up", layer).places
        exact, bound = pair.exact.reshape(shape)[:, by_rows], pair.bound.reshape(shape)[:, by_rows]
        gate, up = exact[:, :, 0], exact[:, :, 1]
        silu = gate / (1 + np.exp(-gate))
        error = 1.1 * (np.abs(up) + bound[:, :, 1]) * bound[:, :, 0]  # |silu'| < 1.1
        error += np.abs(silu) * bound[:, :, 1] + SCALAR * np.abs(silu * up)
        width = self.spec.layers[layer].intermediate_size
        flat = [a.reshape(len(x), -1)[:, :width] for a in (silu * up, error)]
        return self.stored(Value(*flat))

    def heads(self, layer, qkv, positions):
        """Scaled queries, keys and values in bf16: [rows, heads, head_dim]."""
        record = self.spec.layers[layer]
        ends = [record.q_rows, record.q_rows + record.kv_rows]
        q, k, v = (
            part.reshape(len(qkv), -1, record.head_dim)
            for part in np.split(qkv.astype(np.float64)[:, : record.qkv_rows], ends, axis=1)
        )
        q = self.turned(layer, q, "q_norm", positions)
        k = self.turned(layer, k, "k_norm", positions)
        scale = record.attention_scale * np.log2(np.e)
        return (
            self.rounded(q.exact * scale, q.bound * scale),
            self.rounded(k.exact, k.bound),
            to_bf16(v),
        )

    @staticmethod
    def rounded(exact, bound):
        """To bf16: certain, but where the bound reaches a point half way between two of them."""
        return Value(to_bf16(exact), np.abs(to_bf16(exact + bound) - to_bf16(exact - bound)))

    def turned(self, layer, x, norm, positions):
        """QK-norm and rotary embedding."""
        record = self.spec.layers[layer]
        if record.qk_norm:
            mean = (x**2).mean(2, keepdims=True)
            x = x / np.sqrt(mean + self.spec.rms_norm_eps) * self.vector(norm, layer)
        bound = SCALAR * np.abs(x)
        if record.rope_idx < 0:
            return Value(x, bound)
        inv_freq = read_vector(self.image, self.plan.vector("inv_freq", record.rope_idx))
        angles = (np.asarray(positions, np.float32)[:, None] * inv_freq).astype(np.float64)
        factor = self.plan.attention_factors[record.rope_idx]
        half = angles.shape[1]
        cos, sin = (f(angles)[:, None] * factor for f in (np.cos, np.sin))
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        size = 4 * SCALAR * factor * (np.abs(a) + np.abs(b))
        exact = np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)
        return Value(exact, np.concatenate([size, size, bound[..., 2 * half :]], -1))

    def attention(self, layer, qkv, positions, slots):
        record = self.spec.layers[layer]
        q, k, v = self.heads(layer, qkv, positions)
        for row, slot in enumerate(slots):
            del self.past.setdefault((layer, slot), [])[positions[row] :]
            self.past[layer, slot].append((k.exact[row], k.bound[row], v[row]))
        result = [
            self.attend(record, q, row, layer, slot, positions[row])
            for row, slot in enumerate(slots)
        ]
        return self.stored(Value(*(np.stack(part) for part in zip(*result, strict=True))))

    def attend(self, record, q, row, layer, slot, position):
        first = max(0, position - record.window + 1) if record.window else 0
        seen = self.past[layer, slot][first : position + 1]
        keys, key_bounds, values = (np.stack(part) for part in zip(*seen, strict=True))
        group = record.num_q_heads // record.num_kv_heads
        exact, bound = [], []
        for head in range(record.num_q_heads):
            query, query_bound = q.exact[row, head], q.bound[row, head]
            k, kb, v = (part[:, head // group] for part in (keys, key_bounds, values))
            scores = k @ query
            error = np.abs(k) @ query_bound + kb @ np.abs(query) + kb @ query_bound
            error += depth(record.head_dim) * FLOAT * (np.abs(k) @ np.abs(query))
            weights = np.exp2(scores - scores.max())
            weights /= weights.sum()
            # Weights become bf16 (2^-8); numerator and denominator move with the scores.
            off = 2.0**-8 + 2 * np.expm1(np.log(2) * error.max()) + len(seen) * FLOAT + SCALAR
            exact.append(weights @ v)
            bound.append(off * (weights @ np.abs(v)))
        return np.concatenate(exact), np.concatenate(bound)


class Watched:
    """A backend, and the oracle that looks at every stage of every step."""

    def __init__(self, backend, image, table):
        self.backend, self.plan, self.table = backend, backend.plan, table
        self.oracle = StageOracle(self.plan, image)

    def buffer(self, name, rows, cols):
        return self.backend.exchange_buffer(name).astype(np.float64)[:rows, :cols]

    def step(self, tokens, positions, slots):
        """Check every stage of a step, then run it to its end; returns the names of the stages."""
        spec, oracle, n = self.plan.spec, self.oracle, len(tokens)
        arrays = [np.asarray(a, np.int32) for a in (tokens, positions, slots)]
        x, rstd = oracle.embed(tokens)
        checked = []

        def stop(matrix):
            self.backend.decode(*arrays, self.table, 1, stop_after=matrix)

        def check(name, layer, expected, found):
            off = np.abs(found - expected.exact) - expected.bound
            assert off.max() <= 0, f"{name} of layer {layer}: {off.max()} beyond the bound"
            checked.append(name)

        for layer, record in enumerate(spec.layers):
            stop(4 * layer + 1)
            qkv = self.buffer("qkv", n, record.qkv_rows)
            expected = oracle.normed("qkv", layer, x, rstd)
            expected = type(expected)(
                *(a[:, : record.qkv_rows] for a in (expected.exact, expected.bound))
            )
            check("qkv", layer, expected, qkv)

            stop(4 * layer + 2)
            attended = self.buffer("attention", n, record.q_rows)
            check("attention", layer, oracle.attention(layer, qkv, positions, slots), attended)
            hidden = self.buffer("hidden_mlp", n, spec.hidden_size)
            check("o_proj", layer, oracle.add("o_proj", layer, attended), hidden)
            x, rstd = oracle.input("post_attention_layernorm", layer, hidden)

            stop(4 * layer + 3)
            mlp = self.buffer("mlp", n, record.intermediate_size)
            check("gate_up", layer, oracle.gate_up(layer, x, rstd), mlp)

            stop(4 * layer + 4)
            hidden = self.buffer("hidden_attention", n, spec.hidden_size)
            check("down", layer, oracle.add("down", layer, mlp), hidden)
            last = layer + 1 == spec.num_layers
            x, rstd = oracle.input(
                *(("norm", -1) if last else ("input_layernorm", layer + 1)), hidden
            )

        result = self.backend.step(StepBatch(*arrays, self.table, np.arange(n, dtype=np.int32)))
        expected = oracle.normed("lm_head", -1, x, rstd)
        expected = type(expected)(
            *(a[:, : spec.vocab_size] for a in (expected.exact, expected.bound))
        )
        check("lm_head", -1, expected, result.logits)
        assert np.array_equal(result.argmax, result.logits.argmax(1))
        return checked
