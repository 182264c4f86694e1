"""The arguments of one step of the CPU kernel."""

import ctypes

from flashformer.codegen.arguments import ctypes_fields, integer, pointer

STEP_ARGS = (
    pointer("image", "const unsigned char", "packed weights"),
    pointer("kv_pages", "float", "keys and values of all layers"),
    pointer("token_ids", "const int", "[num_rows]"),
    pointer("positions", "const int", "[num_rows]"),
    pointer("slots", "const int", "[num_rows]: row of page_table"),
    pointer("page_table", "const int", "[max_batch][max_pages]"),
    pointer("logit_rows", "const int", "[num_logit_rows], ascending"),
    pointer("logits", "float", "[num_logit_rows][vocab_size], written"),
    pointer("argmax", "int", "[num_logit_rows], written"),
    pointer("stage_times", "long long", "[num_ctas][1 + stages] ns, written"),
    integer("num_rows", "tokens of this step"),
    integer("num_logit_rows", "rows whose logits are wanted"),
    integer("max_pages", "columns of page_table"),
    integer("num_pages", "KV pages that exist"),
    integer("stop_after", "index of the plan's last stage to run; -1: all"),
)


class StepArgs(ctypes.Structure):
    """One step, as the compiled kernel sees it."""

    _fields_ = ctypes_fields(STEP_ARGS)
