"""Writes GGUF files of random weights in the shape of a model, for a peer that reads GGUF.

python benchmarks/random_gguf.py llama-3.2-1b Q4_0 FILE
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec

SEED = 1
CHUNK_ROWS = 1024  # rows that are drawn once and repeated: a random file need not be all different


def write_gguf(path: Path, spec: ModelSpec, weight_type: str) -> None:
    """Write a model of the `llama` architecture; no tokenizer, every matrix in `weight_type`."""
    kind = gguf.GGMLQuantizationType[weight_type]
    writer = gguf.GGUFWriter(path, "llama")
    _write_header(writer, spec)
    tensors = list(_tensors(spec))
    for name, rows, cols in tensors:
        if rows:
            row_bytes = gguf.quant_shape_to_byte_shape((rows, cols), kind)[-1]
            writer.add_tensor_info(
                name, (rows, row_bytes), np.dtype(np.uint8), rows * row_bytes, raw_dtype=kind
            )
        else:
            writer.add_tensor_info(name, (cols,), np.dtype(np.float32), 4 * cols)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(SEED)
    for _, rows, cols in tensors:
        writer.write_tensor_data(
            random_rows(rng, rows, cols, weight_type) if rows else np.ones(cols, np.float32)
        )
    writer.close()


def _write_header(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    layer, rope = spec.layers[0], spec.ropes[0]
    writer.add_name("random")
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(layer.intermediate_size)
    writer.add_head_count(layer.num_q_heads)
    writer.add_head_count_kv(layer.num_kv_heads)
    writer.add_key_length(layer.head_dim)
    writer.add_value_length(layer.head_dim)
    writer.add_rope_dimension_count(rope.rotary_dim)
    writer.add_rope_freq_base(rope.rope_theta)
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _tensors(spec: ModelSpec) -> Iterator[tuple[str, int, int]]:
    """Name, rows (0: a vector) and columns of every tensor, in the file's order."""
    hidden = spec.hidden_size
    yield "token_embd.weight", spec.vocab_size, hidden
    for idx, layer in enumerate(spec.layers):
        inner = layer.intermediate_size
        for name, rows, cols in (
            ("attn_norm", 0, hidden),
            ("attn_q", layer.q_rows, hidden),
            ("attn_k", layer.kv_rows, hidden),
            ("attn_v", layer.kv_rows, hidden),
            ("attn_output", hidden, layer.q_rows),
            ("ffn_norm", 0, hidden),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            yield f"blk.{idx}.{name}.weight", rows, cols
    yield "output_norm.weight", 0, hidden
    if not spec.tie_word_embeddings:
        yield "output.weight", spec.vocab_size, hidden


def random_rows(
    rng: np.random.Generator, rows: int, cols: int, weight_type: str
) -> npt.NDArray[np.uint8]:
    """Rows of a matrix as bytes: weights of mean 0 and a deviation of 1 / sqrt(cols)."""
    drawn = min(rows, CHUNK_ROWS)
    values = rng.standard_normal((drawn, cols), np.float32) / np.float32(np.sqrt(cols))
    stored = gguf.quantize(values, gguf.GGMLQuantizationType[weight_type]).view(np.uint8)
    return np.ascontiguousarray(np.tile(stored, (-(-rows // drawn), 1))[:rows])


def main() -> None:
    """Read the arguments and write one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("weight_type", choices=["BF16", "F16", "Q8_0", "Q4_0"])
    parser.add_argument("path", type=Path)
    arguments = parser.parse_args()
    spec = ModelSpec.from_hf(SHAPES[arguments.shape])
    write_gguf(arguments.path, spec, arguments.weight_type)


if __name__ == "__main__":
    main()
