"""The invariants of a plan: `check(plan)` raises `PlanError` with a sentence, or returns.

A plan that passes can be packed and run without further tests of its numbers.
"""

from itertools import pairwise

from flashformer.errors import PlanError
from flashformer.plan.plan import (
    IMAGE_ALIGNMENT,
    KV_BYTES,
    VECTOR_ALIGNMENT,
    Matrix,
    Plan,
    Vector,
    matrix_format,
)
from flashformer.plan.stages import INPUTS, model_stages
from flashformer.quant.formats import CHOICES, FORMATS, TILE_ROWS
from flashformer.quant.layout import check_layout


def check(plan: Plan) -> None:
    """Raise `PlanError` for the first invariant that `plan` breaks."""
    _check_machine(plan)
    _check_options(plan)
    _check_stages(plan)
    _check_matrices(plan)
    _check_vectors(plan)
    _check_places(plan)


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise PlanError(f"The plan is wrong: {sentence}.")


def _check_machine(plan: Plan) -> None:
    machine = plan.machine
    for name in ("num_ctas", "page_tokens", "max_rows", "world"):
        value = getattr(machine, name)
        _require(value >= 1, f"the machine has {name} = {value}; it must be at least 1")
    _require(
        machine.prompt_rows >= 0,
        f"the machine has prompt_rows = {machine.prompt_rows}; it must be at least 0",
    )
    _require(
        0 <= machine.rank < machine.world,
        f"rank {machine.rank} is not one of the {machine.world} GPUs of the machine",
    )
    _require(
        not machine.compact or machine.layout == "panel",
        f"bf16c exists in the panel layout only, not in {machine.layout}",
    )
    _require(
        machine.kv_format in KV_BYTES,
        f"KV format {machine.kv_format!r} is unknown; choose one of {', '.join(KV_BYTES)}",
    )


def _check_options(plan: Plan) -> None:
    options, machine = plan.options, plan.machine
    _require(
        1 <= options.max_batch <= machine.max_batch,
        f"a plan for {options.max_batch} sequences cannot run on {machine.name}; "
        f"choose 1 to {machine.max_batch}",
    )
    _require(
        options.context >= 1, f"the context is {options.context} tokens; it must be at least 1"
    )
    for name in (options.format, options.head_format):
        _require(
            name in CHOICES,
            f"weight format {name!r} is unknown; choose one of {', '.join(CHOICES)}",
        )
        check_layout(FORMATS[name], machine.layout)


def _check_stages(plan: Plan) -> None:
    written = set(INPUTS)
    for stage in plan.stages:
        for buffer in stage.reads:
            _require(
                buffer in written,
                f"{_label(stage.name, stage.layer)} reads {buffer!r} before any stage wrote it",
            )
        written |= set(stage.writes)
    _require(
        plan.stages == model_stages(plan.spec),
        "the stages are not those of the model: each must run once, in the model's order",
    )


def _expected_matrices(plan: Plan) -> list[tuple[str, int, int, int, str]]:
    spec, hidden = plan.spec, plan.spec.hidden_size
    shapes = []
    if not spec.tie_word_embeddings:
        shapes.append(("embed_tokens", -1, spec.vocab_size, hidden))
    for i, layer in enumerate(spec.layers):
        shapes.append(("qkv", i, layer.q_rows + 2 * layer.kv_rows, hidden))
        shapes.append(("o_proj", i, hidden, layer.q_rows))
        shapes.append(("gate_up", i, 2 * layer.intermediate_size, hidden))
        shapes.append(("down", i, hidden, layer.intermediate_size))
    shapes.append(("lm_head", -1, spec.vocab_size, hidden))
    return [
        (*shape, matrix_format(plan.machine, plan.options, *shape[:2], shape[3]))
        for shape in shapes
    ]


def _check_matrices(plan: Plan) -> None:
    found = [(m.name, m.layer, m.rows, m.cols, m.format) for m in plan.matrices]
    expected = _expected_matrices(plan)
    for have, want in zip(found, expected, strict=False):
        _require(have == want, f"the plan holds the matrix {have} where the model has {want}")
    _require(
        len(found) == len(expected),
        f"the plan holds {len(found)} matrices; the model has {len(expected)}",
    )
    for matrix in plan.matrices:
        _check_split(plan, matrix)


def _check_split(plan: Plan, matrix: Matrix) -> None:
    label, first = _label(matrix.name, matrix.layer), matrix.first_tile
    _require(
        len(first) == plan.machine.num_ctas + 1,
        f"{label} is split over {len(first) - 1} CTAs; the machine has {plan.machine.num_ctas}",
    )
    _require(
        first[0] == 0 and first[-1] == matrix.num_tiles,
        f"{label} has tiles 0 to {matrix.num_tiles}, its split covers {first[0]} to {first[-1]}",
    )
    shares = [end - start for start, end in pairwise(first)]
    _require(min(shares) >= 0, f"the split of {label} runs backwards: a tile would be done twice")
    _require(
        max(shares) - min(shares) <= 1,
        f"the split of {label} gives one CTA {max(shares)} tiles and another {min(shares)}",
    )
    _require(
        0 <= matrix.late <= min(shares),
        f"{label} gives every CTA {matrix.late} tiles from its end; one has {min(shares)} in all",
    )


def _expected_vectors(plan: Plan) -> list[tuple[str, int, int]]:
    spec = plan.spec
    hidden = spec.hidden_size
    tiles = {(m.name, m.layer): m.num_tiles * TILE_ROWS for m in plan.matrices}
    expected = [("inv_freq", i, rope.rotary_dim // 2) for i, rope in enumerate(spec.ropes)]
    for i, layer in enumerate(spec.layers):
        rows = [
            (True, "input_layernorm", hidden),
            (layer.qkv_bias, "qkv_bias", tiles["qkv", i]),
            (layer.qk_norm, "q_norm", layer.head_dim),
            (layer.qk_norm, "k_norm", layer.head_dim),
            (layer.o_bias, "o_bias", tiles["o_proj", i]),
            (True, "post_attention_layernorm", hidden),
            (layer.mlp_bias, "gate_up_bias", tiles["gate_up", i]),
            (layer.mlp_bias, "down_bias", tiles["down", i]),
        ]
        expected += [(name, i, length) for present, name, length in rows if present]
    return [*expected, ("norm", -1, hidden)]


def _check_vectors(plan: Plan) -> None:
    found = [(v.name, v.layer, v.length) for v in plan.vectors]
    expected = _expected_vectors(plan)
    missing = sorted(set(expected) - set(found))
    _require(not missing, f"the plan lacks the vector {missing[:1]} (name, layer, length)")
    _require(
        sorted(found) == sorted(expected),
        f"the plan holds {len(found)} vectors; the model has {len(expected)}, each once",
    )
    _require(
        len(plan.attention_factors) == len(plan.spec.ropes),
        f"the plan has {len(plan.attention_factors)} attention factors for "
        f"{len(plan.spec.ropes)} RoPE tables",
    )
    for layer in plan.spec.layers:
        _require(
            -1 <= layer.rope_idx < len(plan.spec.ropes),
            f"a layer uses RoPE table {layer.rope_idx}; the model has {len(plan.spec.ropes)}",
        )


def _check_places(plan: Plan) -> None:
    items: list[tuple[Matrix | Vector, int]] = [(m, IMAGE_ALIGNMENT) for m in plan.matrices]
    items += [(v, VECTOR_ALIGNMENT) for v in plan.vectors]
    for item, alignment in items:
        _require(
            item.offset >= 0 and item.offset % alignment == 0,
            f"{_label(item.name, item.layer)} starts at byte {item.offset}, "
            f"which is not a multiple of {alignment}",
        )
    for earlier, later in pairwise(plan.matrices):
        _require(
            earlier.offset < later.offset,
            f"{_label(later.name, later.layer)} lies before {_label(earlier.name, earlier.layer)} "
            "in the image, against the order of reading",
        )
    ordered = sorted((item for item, _ in items), key=lambda item: item.offset)
    for before, after in pairwise(ordered):
        _require(
            before.offset + before.nbytes <= after.offset,
            f"{_label(before.name, before.layer)} and {_label(after.name, after.layer)} overlap "
            f"at byte {after.offset}",
        )
    last = ordered[-1]
    _require(
        last.offset + last.nbytes <= plan.image_bytes,
        f"{_label(last.name, last.layer)} ends at byte {last.offset + last.nbytes}, "
        f"after the image's {plan.image_bytes} bytes",
    )


def _label(name: str, layer: int) -> str:
    return name if layer < 0 else f"{name} of layer {layer}"
