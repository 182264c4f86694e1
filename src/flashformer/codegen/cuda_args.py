"""The arguments of one launch of the CUDA kernel."""

import ctypes

from flashformer.codegen.arguments import ctypes_fields, integer, pointer, real, unsigned

MAX_ROWS = 8
MAX_STOP_IDS = 32  # of a row: one a lane

CUDA_STEP_ARGS = (
    pointer("image", "const unsigned char", "packed weights"),
    pointer("kv", "unsigned char", "[layers][pages][kv heads][keys, values]"),
    pointer("exchange", "unsigned char", "buffers between stages (kernel/exchange.cuh)"),
    pointer("logits", "float", "[max_rows][vocab_size in whole tiles] of the last step"),
    pointer("page_table", "const int", "[max_batch][max_pages]"),
    pointer("out_tokens", "int", "[num_steps][max_rows], pinned host memory"),
    pointer("stop", "const unsigned int", "pinned host memory: not 0 ends the launch"),
    pointer("abandon", "unsigned int", "epoch of the last launch that was to end within a token"),
    pointer("barrier", "unsigned int", "the grid barrier's counter"),
    pointer("watchdog", "unsigned int", "[1], pinned host memory: a wait that timed out"),
    pointer("trace", "unsigned long long", "[num_ctas][2][trace_moments][2] (Cta::trace)"),
    pointer("adjusted", "float", "[max_rows][vocab_size in whole tiles]: of adjusted_rows"),
    pointer("bias", "const float", "[max_rows][vocab_size in whole tiles]: of biased_rows"),
    pointer("counts", "unsigned int", "the same: of penalised_rows (kernel/adjust.cuh)"),
    pointer("buckets", "void", "[3][max_rows][num_buckets], zero (kernel/filter.cuh)"),
    unsigned("wait_limit_ns", "no wait lasts longer", bits=64),
    unsigned("x_bytes", "shared memory of the activations"),
    integer("num_slots", "slots of the ring"),
    integer("in_flight", "most copies on their way to a CTA"),
    integer("full_in_flight", "the same while half of the slots wait to be read"),
    integer("num_rows", "tokens of a step"),
    integer("num_steps", "tokens of a row"),
    integer(
        "firm_steps", "of these, the first ones are drawn to their end whatever the host wants"
    ),
    integer("num_pages", "KV pages of a layer"),
    integer("max_pages", "columns of page_table"),
    integer("stop_after", "end after this many matrices; 0: run to the end"),
    integer("drop_matrix", "tests: its packets are lost, from 1; 0: none"),
    integer("drop_cta", "tests: of this CTA"),
    unsigned("epoch", "of the first layer of the first step (Exchange::partial)"),
    unsigned("delay_seed", "tests: of the random sleeps"),
    unsigned("kept_rows", "bit r: the logits of row r are written"),
    unsigned("sampled_rows", "rows that are not plainly greedy; they are kept as well"),
    unsigned("adjusted_rows", "of those, rows whose logits are changed before the choice"),
    unsigned("biased_rows", "of those, rows with a bias"),
    unsigned("penalised_rows", "of those, rows with penalties"),
    unsigned("filtered_rows", "of sampled_rows, rows with top-k, top-p or min-p"),
    integer("tokens", "of the first step", length=MAX_ROWS),
    integer("positions", "of those tokens", length=MAX_ROWS),
    integer("bases", "positions of the row's sequence stored before the launch", length=MAX_ROWS),
    integer("slots", "rows of page_table", length=MAX_ROWS),
    unsigned("seeds", "keys of the random numbers", bits=64, length=MAX_ROWS),
    integer("indices", "which of a request's sequences", length=MAX_ROWS),
    real("temperature", "0: greedy", length=MAX_ROWS),
    integer("top_k", "0: off", length=MAX_ROWS),
    unsigned("top_p", "in units of 2^-64; 0: off", bits=64, length=MAX_ROWS),
    real("floors", "the least scaled logit that may win", length=MAX_ROWS),
    real("repetition_penalty", "", length=MAX_ROWS),
    real("frequency_penalty", "", length=MAX_ROWS),
    real("presence_penalty", "", length=MAX_ROWS),
    integer("min_steps", "steps in which the stop ids are forbidden", length=MAX_ROWS),
    integer("num_stop_ids", "of a row", length=MAX_ROWS),
    integer("stop_ids", "[max_rows][max_stop_ids]: end the launch", length=MAX_ROWS * MAX_STOP_IDS),
)


class CudaStepArgs(ctypes.Structure):
    """One launch, as the compiled kernel sees it."""

    _fields_ = ctypes_fields(CUDA_STEP_ARGS)
