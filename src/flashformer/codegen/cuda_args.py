"""The arguments of one launch of the CUDA kernel."""

import ctypes

from flashformer.codegen.arguments import ctypes_fields, integer, pointer, unsigned

CUDA_STEP_ARGS = (
    pointer("image", "const unsigned char", "packed weights"),
    pointer("kv", "unsigned char", "[layers][pages][kv heads][keys, values]"),
    pointer("exchange", "unsigned char", "buffers between stages (kernel/exchange.cuh)"),
    pointer("logits", "float", "[max_rows][vocab_size] of the last step"),
    pointer("page_table", "const int", "[max_batch][max_pages]"),
    pointer("out_tokens", "int", "[num_steps][max_rows]"),
    pointer("barrier", "unsigned int", "the grid barrier's counter"),
    pointer("arrivals", "unsigned int", "[max_rows][kv heads], zero"),
    pointer("watchdog", "unsigned int", "[8], pinned host memory: the first wait to time out"),
    pointer("trace", "unsigned long long", "[num_ctas][2][trace_moments][2] (Cta::trace)"),
    unsigned("wait_limit_ns", "no wait lasts longer", bits=64),
    unsigned("barrier_start", "value of the counter before the launch"),
    unsigned("x_bytes", "shared memory of the activations"),
    integer("num_slots", "slots of the ring"),
    integer("num_rows", "tokens of a step"),
    integer("num_steps", "tokens of a row"),
    integer("num_pages", "KV pages of a layer"),
    integer("max_pages", "columns of page_table"),
    integer("stop_after", "end after this many matrices; 0: run to the end"),
    integer("drop_matrix", "tests: its packets are lost, from 1; 0: none"),
    integer("drop_cta", "tests: of this CTA"),
    unsigned("delay_seed", "tests: of the random sleeps"),
    integer("tokens", "of the first step", length=8),
    integer("positions", "of those tokens", length=8),
    integer("bases", "positions of the row's sequence stored before the first step", length=8),
    integer("slots", "rows of page_table", length=8),
)


class CudaStepArgs(ctypes.Structure):
    """One launch, as the compiled kernel sees it."""

    _fields_ = ctypes_fields(CUDA_STEP_ARGS)
