"""Prompts: many rows of one sequence at once, through torch's matrix products and attention.

Plan, image, pages + the tokens of a chunk -> its keys and values in their pages, as the kernel
would have appended them, and the logits that are wanted. A matrix is unpacked when its turn comes,
slab by slab into one buffer: there is no second copy of the model. Nothing waits for the host
between layers.
"""

from dataclasses import dataclass

import numpy as np
import torch

from flashformer.backends.base import Float32, Int32
from flashformer.backends.cuda.prefill_attention import (
    attend,
    attend_in_blocks,
    blocks_are_fast,
)
from flashformer.backends.cuda.prefill_kernels import KernelOps
from flashformer.backends.cuda.prefill_ops import (
    Heads,
    PrefillOps,
    Rotation,
    TorchOps,
    Update,
    multiply,
    rotations,
)
from flashformer.backends.cuda.prefill_slab import Operand, operand_of, slab_bytes
from flashformer.backends.cuda.seen import Seen, channels, most_tokens
from flashformer.backends.cuda.unpack import UNPACKING_BYTES
from flashformer.errors import OutOfMemoryError
from flashformer.model.spec import LayerSpec
from flashformer.plan.plan import Plan
from flashformer.quant.formats import TILE_ROWS

LOGIT_ROWS = 128  # whose logits are computed at once
WARM_ROWS = (32, 256, 1024)  # for which cuBLAS may choose different kernels
LIBRARY_BYTES = 96 << 20  # workspaces of cuBLAS, small buffers of attention


def workspace_bytes(plan: Plan) -> int:
    """Most bytes that a chunk takes beside the image and the pages."""
    layer, hidden = plan.spec.layers[0], plan.spec.hidden_size
    rows = min(plan.machine.prompt_rows, plan.options.context)
    slab = slab_bytes(plan)
    # Of a row, at once: the hidden state, its last update and the next in float32, normalised in 16
    # bits; with them q, k and v in float32, rounded queries, attention's output and its copy, or
    # gate, up and their product.
    attention = 4 * layer.qkv_rows + 3 * 2 * layer.num_q_heads * channels(plan)
    mlp = 3 * 2 * (layer.intermediate_size + TILE_ROWS)
    in_layers = rows * (14 * hidden + max(attention, mlp))
    embedding = rows * 6 * hidden + slab  # the tiles of the tokens, as stored
    seen = 2 * 2 * most_tokens(plan) * layer.num_kv_heads * channels(plan)
    logits = LOGIT_ROWS * plan.spec.vocab_size * 4
    decoded = UNPACKING_BYTES if any(m.weight_format.quantised for m in plan.matrices) else 0
    return slab + seen + max(in_layers, embedding) + logits + decoded + LIBRARY_BYTES


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's numbers and views, looked up once."""

    index: int
    record: LayerSpec
    matrices: dict[str, Operand]
    vectors: dict[str, torch.Tensor]
    stored: torch.Tensor  # `Matrix.stored_tiles` of gate_up


class Prefill:
    """Runs chunks of prompts of one plan, on the device of its tensors. Not thread-safe."""

    def __init__(
        self,
        plan: Plan,
        image: torch.Tensor,
        kv: torch.Tensor,
        activations: torch.dtype | None = None,
    ) -> None:
        """`image` uint8 [plan.image_bytes] and `kv` uint8, the pages of all layers, are kept.

        `activations`: what hidden states are rounded to before a product; by default the 16 bits of
        the matrix, as in the kernel.
        """
        self._machine = plan.machine
        self._workspace_bytes = workspace_bytes(plan)
        self._image = image
        self._activations = activations
        self._ops: PrefillOps
        if image.is_cuda:
            self._ops = KernelOps(plan)
        else:
            self._ops = TorchOps(plan.spec.layers[0].head_dim, plan.spec.rms_norm_eps)
        self._channels = channels(plan)
        self._slab = torch.empty(slab_bytes(plan), dtype=torch.uint8, device=image.device)
        operands = {(m.name, m.layer): operand_of(m, image, self._slab) for m in plan.matrices}
        vectors = _views(plan, image)
        self._ropes = [
            (vectors["inv_freq", i], factor) for i, factor in enumerate(plan.attention_factors)
        ]
        self._layers = [
            _Layer(
                index,
                record,
                {name: operand for (name, at), operand in operands.items() if at == index},
                {v.name: vectors[v.name, index] for v in plan.vectors if v.layer == index},
                torch.as_tensor(plan.matrix("gate_up", index).stored_tiles, dtype=torch.int32).to(
                    image.device
                ),
            )
            for index, record in enumerate(plan.spec.layers)
        ]
        self._norm = vectors["norm", -1]
        self._head = operands["lm_head", -1]
        tied = plan.spec.tie_word_embeddings
        self._embedding = self._head if tied else operands["embed_tokens", -1]
        self._seen = Seen(plan, kv, self._ops)
        rows = self._machine.page_tokens
        query = self._new_query(self._layers[0].record, rows)
        self._blocks = blocks_are_fast(query, self._seen.keys[:rows])

    def warm_up(self, num_pages: int) -> None:
        """Run prompts of a few lengths through the first pages, whose content is lost.

        torch loads its kernels and takes its workspace now instead of during the first prompt.
        """
        page_tokens, device = self._machine.page_tokens, self._image.device
        most = min(self._machine.prompt_rows, self._seen.max_tokens, num_pages * page_tokens)
        for rows in sorted({min(most, rows) for rows in (*WARM_ROWS, most)}):
            pages = torch.arange(-(-rows // page_tokens), device=device)
            last = np.array([rows - 1], np.int32)
            self.prompt(np.zeros(rows, np.int32), 0, pages, last)
        self._warm_up_blocks()

    @torch.inference_mode()
    def _warm_up_blocks(self) -> None:
        rows, seen = self._machine.prompt_rows, self._seen
        query = self._new_query(self._layers[0].record, rows)
        past = rows
        while self._blocks and rows + past <= seen.max_tokens:
            both = seen.keys[: rows + past], seen.values[: rows + past]
            attend_in_blocks(query, *both, 1.0, self._ops)
            past *= 2

    @torch.inference_mode()
    def prompt(
        self, token_ids: Int32, first: int, pages: torch.Tensor, logit_rows: Int32
    ) -> Float32:
        """Run the rows of a prompt that goes on at position `first`; logits of `logit_rows`.

        `pages` int64: the sequence's, from position 0 to at least the last row's. `logit_rows` [n],
        ascending, count from the first row here. Chunks end at multiples of `machine.prompt_rows`.
        Raises `OutOfMemoryError` if others have taken the memory that was free at the start.
        """
        try:
            return self._prompt(token_ids, first, pages, logit_rows)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"reading a prompt needs up to {self._workspace_bytes / 2**30:.2f} GiB of GPU "
                "memory, and something else has taken it since the model was loaded; free it and "
                "send the prompt again"
            ) from error

    def _prompt(
        self, token_ids: Int32, first: int, pages: torch.Tensor, logit_rows: Int32
    ) -> Float32:
        ids = torch.from_numpy(token_ids.astype(np.int64)).to(pages.device)
        parts, start = [np.empty((0, self._head.num_rows), np.float32)], 0
        while start < len(ids):
            end = min(len(ids), start + self._machine.chunk_rows(first + start))
            rows = logit_rows[(logit_rows >= start) & (logit_rows < end)] - start
            used = pages[: -(-(first + end) // self._machine.page_tokens)]
            wanted_from = int(rows[0]) if len(rows) else end - start
            hidden = self.run(ids[start:end], first + start, used, wanted_from)
            picked = torch.from_numpy(rows.astype(np.int64) - wanted_from).to(pages.device)
            for at in range(0, len(rows), LOGIT_ROWS):
                some = hidden[picked[at : at + LOGIT_ROWS]]
                parts.append(self.logits(some).cpu().numpy())
            start = end
        return np.concatenate(parts)

    @torch.inference_mode()
    def run(
        self, token_ids: torch.Tensor, first: int, pages: torch.Tensor, wanted_from: int
    ) -> torch.Tensor:
        """The head's input for the rows from `wanted_from` on: [n, hidden_size], normalised.

        `token_ids` int64 [rows] stand at positions from `first` on; `pages` int64 are those of the
        sequence, from position 0 to the last row's. Keys and values of all rows go into their
        pages; positions behind the last row in its page become zero.
        """
        hidden = self._embed(token_ids)
        turns = [rotations(f, factor, first, len(hidden)) for f, factor in self._ropes]
        update = None
        for layer in self._layers:
            vectors, matrices = layer.vectors, layer.matrices
            x = self._add_norm(hidden, update, vectors["input_layernorm"], matrices["qkv"])
            qkv = self._project(x, matrices["qkv"], torch.float32)
            rotation = turns[layer.record.rope_idx] if layer.record.rope_idx >= 0 else None
            query, keys, values = self._heads(layer, qkv, rotation, first, pages)
            if layer.index + 1 == len(self._layers):  # of which nobody needs the other rows
                hidden, query = hidden[wanted_from:], query[wanted_from:]
                if len(hidden) == 0:
                    return torch.empty_like(hidden, dtype=self._dtype(self._head))
            update = Update(self._attention(layer, query, keys, values), vectors.get("o_bias"))
            norm = vectors["post_attention_layernorm"]
            x = self._add_norm(hidden, update, norm, matrices["gate_up"])
            update = Update(self._mlp(layer, x), vectors.get("down_bias"))
        return self._add_norm(hidden, update, self._norm, self._head)

    @torch.inference_mode()
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of up to LOGIT_ROWS rows that `run` returned: float32 [n, vocab_size]."""
        return self._project(x, self._head, torch.float32)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding: float32 [rows, hidden_size]."""
        table = self._embedding
        room = table.pieces[0]
        hidden = torch.empty(
            (len(token_ids), table.cols), dtype=torch.float32, device=token_ids.device
        )
        for start in range(0, len(token_ids), len(room.tiles)):
            ids = token_ids[start : start + len(room.tiles)]
            rows = room.rows[: len(ids) * TILE_ROWS]
            self._ops.unpack(table.tiles[ids // TILE_ROWS], table.weight_format, rows)
            picked = torch.arange(len(ids), device=ids.device) * TILE_ROWS + ids % TILE_ROWS
            hidden[start : start + len(ids)] = rows[picked, : table.cols]
        return hidden

    def _heads(
        self,
        layer: _Layer,
        qkv: torch.Tensor,
        rotation: Rotation | None,
        first: int,
        pages: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries of the rows, keys and values that they see; the own ones go to their pages."""
        record = layer.record
        keys, values = self._seen.open(layer.index, first, len(qkv), record.window, pages)
        query = self._new_query(record, len(qkv))
        self._ops.split_heads(qkv, layer.vectors, rotation, Heads(query, keys, values))
        return query, *self._seen.close(layer.index, pages)

    def _new_query(self, record: LayerSpec, rows: int) -> torch.Tensor:
        shape = (rows, record.num_q_heads, self._channels)
        dtype = self._activations or torch.bfloat16
        return torch.empty(shape, dtype=dtype, device=self._image.device)

    def _attention(
        self, layer: _Layer, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Attention of the rows through o_proj: float32 [rows, hidden_size]."""
        record, rows = layer.record, len(query)
        whole = rows == self._machine.prompt_rows and len(keys) % rows == 0
        if self._blocks and whole and not record.window:
            attended = attend_in_blocks(query, keys, values, record.attention_scale, self._ops)
        else:
            attended = attend(query, keys, values, record.attention_scale, record.window)
        x = attended[..., : record.head_dim].reshape(len(query), record.q_rows)
        o_proj = layer.matrices["o_proj"]
        return self._project(x.to(self._dtype(o_proj)), o_proj, torch.float32)

    def _mlp(self, layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        """The MLP of normalised rows, without the last bias: float32 [rows, hidden_size]."""
        gate_up, down = layer.matrices["gate_up"], layer.matrices["down"]
        pairs = self._project(x, gate_up, self._dtype(gate_up))
        size = (len(x), gate_up.num_rows // 2)
        activated = torch.empty(size, dtype=self._dtype(down), device=x.device)
        self._ops.activate(pairs, layer.vectors.get("gate_up_bias"), layer.stored, activated)
        return self._project(activated[:, : down.cols], down, torch.float32)

    def _add_norm(
        self,
        hidden: torch.Tensor,
        update: Update | None,
        weight: torch.Tensor,
        reader: Operand,
    ) -> torch.Tensor:
        """Add to the hidden state; normalised rows as `reader` takes them: [rows, hidden_size]."""
        out = torch.empty_like(hidden, dtype=self._dtype(reader))
        self._ops.add_norm(hidden, update, weight, out)
        return out

    def _project(self, x: torch.Tensor, operand: Operand, dtype: torch.dtype) -> torch.Tensor:
        """The matrix times every row of `x`: [rows, num_rows]."""
        out = torch.empty((len(x), operand.num_rows), dtype=dtype, device=x.device)
        for piece in operand.pieces:
            self._ops.unpack(piece.tiles, operand.weight_format, piece.rows)
            multiply(x, piece.weights, out[:, piece.columns])
        return out

    def _dtype(self, operand: Operand) -> torch.dtype:
        return self._activations or operand.dtype


def _views(plan: Plan, image: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
    """Every vector by name and layer: float32; biases of hidden_size without their padding."""
    short = {"o_bias": plan.spec.hidden_size, "down_bias": plan.spec.hidden_size}
    views = {}
    for v in plan.vectors:
        stored = image[v.offset : v.offset + 4 * v.length].view(torch.float32)
        views[v.name, v.layer] = stored[: short.get(v.name, v.length)]
    return views
