"""What the plan runs on: the few numbers of a machine that decide a plan."""

from dataclasses import dataclass

MAX_BATCH = 8  # sequences of one step; the kernels' widest column count


@dataclass(frozen=True, slots=True)
class Machine:
    """A CPU or a GPU as the planner sees it."""

    kind: str  # reference | cpu | cuda
    name: str
    arch: str  # avx512vnni | avx512 | avx2 | neon | scalar | sm_90a ...
    num_ctas: int  # threads of a CPU, streaming multiprocessors of a GPU
    layout: str  # order of the codes in a block: rows (reference), panel (cpu), fragment (cuda)
    page_tokens: int  # tokens of a KV page
    kv_format: str  # f32 | f16 | bf16: how keys and values are stored
    max_rows: int  # rows (tokens) of one step
    prompt_rows: int = 0  # rows of one prompt beside the others of a step; 0: they share max_rows
    compact: bool = False  # bf16 is stored as bf16c, in 12 bits without loss, where it fits
    shared_bytes: int = 0  # shared memory a CTA (cuda)
    slot_bytes: int = 0  # of the ring, with weights as they are stored (cuda)
    window_bytes: int = 0  # of activations that do not fit shared memory at once (cuda)
    world: int = 1  # GPUs that share the model
    rank: int = 0  # which of them this is

    @property
    def begins_down_early(self) -> bool:
        """Whether down begins before all of gate_up has arrived (`in_two` of kernel/stages.cuh)."""
        return self.kind == "cuda"

    @property
    def max_batch(self) -> int:
        """Most sequences of one step, and as many as it has where nobody chose."""
        return min(MAX_BATCH, self.max_rows)

    def chunk_rows(self, start: int, others: int = 0) -> int:
        """Most rows of a step for a prompt that goes on at position `start`, beside `others` rows.

        Where prompts have rows of their own, chunks end at multiples of `prompt_rows`: a prompt's
        chunks are the same whatever runs beside it.
        """
        if self.prompt_rows:
            return self.prompt_rows - start % self.prompt_rows
        return self.max_rows - others
