"""The plan as a table for people: what each stage reads, in which format, and how it is shared.

Plan -> text; identical layers share their lines.
"""

from dataclasses import replace
from itertools import groupby, pairwise

from flashformer.model.spec import LayerSpec
from flashformer.plan.plan import Matrix, Plan

Row = tuple[str, ...]

HEADINGS: Row = ("layers", "stage", "shape", "format", "tiles", "bytes", "bytes a CTA")
LEFT_COLUMNS = 4  # the text columns; numbers are aligned to the right


def show(plan: Plan) -> str:
    """The plan as lines of text: machine, stages with shares of the CTAs, totals."""
    rows = [HEADINGS]
    for matrix in plan.matrices:
        if matrix.name == "embed_tokens":
            rows.append(_matrix_row("", "embed", matrix))
    for label, index, layer in _layer_groups(plan):
        rows += _layer_rows(plan, label, index, layer)
    rows.append(_matrix_row("", "lm_head", plan.matrix("lm_head")))
    return "\n".join([_title(plan), "", *_aligned(rows), "", *_totals(plan)])


def _title(plan: Plan) -> str:
    spec, machine = plan.spec, plan.machine
    return (
        f"{spec.model_type}, {spec.num_layers} layers, on {machine.name} ({machine.arch}): "
        f"{machine.num_ctas} CTAs, layout {machine.layout}, up to {machine.max_rows} rows a step"
    )


def _layer_groups(plan: Plan) -> list[tuple[str, int, LayerSpec]]:
    """Runs of layers that read the same bytes: label, index of the first, record."""
    groups = []
    alike = [replace(layer, rope_idx=-1) for layer in plan.spec.layers]  # NoPE reads as much
    for layer, run in groupby(enumerate(alike), key=lambda item: item[1]):
        indices = [index for index, _ in run]
        first, last = indices[0], indices[-1]
        groups.append((f"{first}" if first == last else f"{first}..{last}", first, layer))
    return groups


def _layer_rows(plan: Plan, label: str, index: int, layer: LayerSpec) -> list[Row]:
    matrices = {m.name: m for m in plan.matrices if m.layer == index}
    seen = f"last {layer.window}" if layer.window else "all tokens"
    heads = f"{layer.num_q_heads}:{layer.num_kv_heads} heads of {layer.head_dim}, {seen}"
    per_token = plan.kv_bytes_of(layer)
    attention = ("", "attention", heads, plan.machine.kv_format, "", f"{per_token:,} a token", "")
    return [
        _matrix_row(label, "qkv", matrices["qkv"]),
        attention,
        *(_matrix_row("", name, matrices[name]) for name in ("o_proj", "gate_up", "down")),
    ]


def _matrix_row(label: str, stage: str, matrix: Matrix) -> Row:
    shares = [(end - first) * matrix.tile_bytes for first, end in pairwise(matrix.first_tile)]
    low, high = min(shares), max(shares)
    return (
        label,
        stage,
        f"{matrix.rows} x {matrix.cols}",
        matrix.format,
        f"{matrix.num_tiles:,}",
        f"{matrix.nbytes:,}",
        f"{low:,}" if low == high else f"{low:,} .. {high:,}",
    )


def _aligned(rows: list[Row]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < LEFT_COLUMNS else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _totals(plan: Plan) -> list[str]:
    context = plan.options.context
    return [
        f"image                   {plan.image_bytes:,} bytes",
        f"keys and values         {plan.kv_bytes_per_token:,} bytes a token",
        f"read a step, context 1  {plan.bytes_per_step(1):,} bytes",
        f"read a step, full       {plan.bytes_per_step(context):,} bytes at {context:,} tokens",
        f"key                     {plan.key[:16]}",
    ]
