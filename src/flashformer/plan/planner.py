"""The function that makes a plan: ModelSpec + Machine + PlanOptions -> `Plan`."""

from dataclasses import dataclass, replace

from flashformer.errors import UsageError
from flashformer.model.spec import LayerSpec, ModelSpec, RopeSpec
from flashformer.plan.machine import Machine
from flashformer.plan.plan import (
    IMAGE_ALIGNMENT,
    VECTOR_ALIGNMENT,
    Matrix,
    Plan,
    PlanOptions,
    Vector,
    matrix_format,
)
from flashformer.plan.stages import model_stages
from flashformer.plan.tiles import late_tiles, split_tiles
from flashformer.quant.formats import CHOICES, FORMATS, TILE_ROWS
from flashformer.quant.layout import check_layout


@dataclass(frozen=True, slots=True)
class _Shape:
    """A matrix before it has a place."""

    name: str
    layer: int
    rows: int
    cols: int
    format: str


def plan_model(spec: ModelSpec, machine: Machine, options: PlanOptions) -> Plan:
    """Make and check the plan; see `plan.make_plan`."""
    from flashformer.plan.check import check

    _check_options(spec, machine, options)
    shapes = _shapes(spec, machine, options)
    vectors, end = _place_vectors(_vectors(spec, machine, shapes))
    matrices, image_bytes = _place_matrices(shapes, machine, _align(end, IMAGE_ALIGNMENT))
    plan = Plan(
        spec=spec,
        machine=machine,
        options=options,
        stages=model_stages(spec),
        matrices=matrices,
        vectors=vectors,
        image_bytes=image_bytes,
        attention_factors=tuple(float(r.frequencies(options.context)[1]) for r in spec.ropes),
    )
    check(plan)
    return plan


def longest_context(spec: ModelSpec) -> int:
    """Positions that the model was made for, its RoPE scaling included."""
    return max(spec.max_position_embeddings, *(_scaled_positions(r) for r in spec.ropes), 0)


def _scaled_positions(rope: RopeSpec) -> int:
    parameters = dict(rope.parameters)
    if rope.rope_type not in ("linear", "dynamic", "yarn"):
        return rope.max_position_embeddings
    original = parameters.get("original_max_position_embeddings") or rope.max_position_embeddings
    return max(rope.max_position_embeddings, int(original * parameters.get("factor", 1.0)))


def _check_options(spec: ModelSpec, machine: Machine, options: PlanOptions) -> None:
    for name in (options.format, options.head_format):
        if name not in CHOICES:
            raise UsageError(
                f"Weight format {name!r} is unknown; choose one of {', '.join(CHOICES)}."
            )
        check_layout(FORMATS[name], machine.layout)
    limit = longest_context(spec)
    if not 1 <= options.context <= limit:
        raise UsageError(
            f"A context of {options.context} tokens is not possible: {spec.model_type} with this "
            f"config.json has {limit} positions; choose 1 to {limit}."
        )
    if not 1 <= options.max_batch <= machine.max_batch:
        raise UsageError(
            f"A batch of {options.max_batch} sequences is not possible on {machine.name}; "
            f"choose a max_batch (--max-batch) of 1 to {machine.max_batch}."
        )


def _shapes(spec: ModelSpec, machine: Machine, options: PlanOptions) -> list[_Shape]:
    """All matrices in the order in which one token reads them."""

    def shape(name: str, layer: int, rows: int, cols: int) -> _Shape:
        stored = matrix_format(machine, options, name, layer, cols)
        return _Shape(name, layer, rows, cols, stored)

    hidden, vocab = spec.hidden_size, spec.vocab_size
    shapes = []
    if not spec.tie_word_embeddings:
        shapes.append(shape("embed_tokens", -1, vocab, hidden))
    for i, layer in enumerate(spec.layers):
        shapes += [
            shape("qkv", i, layer.qkv_rows, hidden),
            shape("o_proj", i, hidden, layer.q_rows),
            shape("gate_up", i, 2 * layer.intermediate_size, hidden),
            shape("down", i, hidden, layer.intermediate_size),
        ]
    return [*shapes, shape("lm_head", -1, vocab, hidden)]


def _vectors(spec: ModelSpec, machine: Machine, shapes: list[_Shape]) -> list[Vector]:
    """All vectors in the order in which one token reads them, without offsets."""
    padded = {(s.name, s.layer): _place(s, machine, 0).num_tiles * TILE_ROWS for s in shapes}
    vectors = [Vector("inv_freq", i, r.rotary_dim // 2, 0) for i, r in enumerate(spec.ropes)]
    for i, layer in enumerate(spec.layers):
        vectors += [Vector(n, i, length, 0) for n, length in _layer_vectors(spec, layer, i, padded)]
    return [*vectors, Vector("norm", -1, spec.hidden_size, 0)]


def _layer_vectors(
    spec: ModelSpec, layer: LayerSpec, index: int, padded: dict[tuple[str, int], int]
) -> list[tuple[str, int]]:
    vectors = [("input_layernorm", spec.hidden_size)]
    if layer.qkv_bias:
        vectors.append(("qkv_bias", padded["qkv", index]))
    if layer.qk_norm:
        vectors += [("q_norm", layer.head_dim), ("k_norm", layer.head_dim)]
    if layer.o_bias:
        vectors.append(("o_bias", padded["o_proj", index]))
    vectors.append(("post_attention_layernorm", spec.hidden_size))
    if layer.mlp_bias:
        vectors.append(("gate_up_bias", padded["gate_up", index]))
        vectors.append(("down_bias", padded["down", index]))
    return vectors


def _place_vectors(vectors: list[Vector]) -> tuple[tuple[Vector, ...], int]:
    placed, offset = [], 0
    for vector in vectors:
        offset = _align(offset, VECTOR_ALIGNMENT)
        placed.append(replace(vector, offset=offset))
        offset += vector.nbytes
    return tuple(placed), offset


def _place_matrices(
    shapes: list[_Shape], machine: Machine, offset: int
) -> tuple[tuple[Matrix, ...], int]:
    placed = []
    for shape in shapes:
        placed.append(_place(shape, machine, offset))
        offset = _align(offset + placed[-1].nbytes, IMAGE_ALIGNMENT)
    return tuple(placed), offset


def _place(shape: _Shape, machine: Machine, offset: int) -> Matrix:
    matrix = Matrix(
        shape.name, shape.layer, shape.rows, shape.cols, shape.format, offset, first_tile=()
    )
    # Where few CTAs have a tile of the hidden state, o_proj's are not also down's.
    shifted = shape.name == "down" and matrix.num_tiles < machine.num_ctas
    split = split_tiles(matrix.num_tiles, machine.num_ctas, shifted=shifted)
    early = shape.name == "gate_up" and machine.begins_down_early
    late = late_tiles(matrix.num_tiles, machine.num_ctas) if early else 0
    return replace(matrix, first_tile=split, late=late)


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
