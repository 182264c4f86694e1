"""ModelSpec -> the ordered stages of one step, with the buffers each reads and writes.

Buffers, of `rows` tokens: token_ids; hidden [hidden_size], the residual stream; qkv [qkv_rows], the
projection with its bias, before QK-norm and RoPE; kv, the pages of keys and values; attended
[q_rows]; activated [intermediate_size]; logits [vocab_size]; argmax.
"""

from flashformer.model.spec import ModelSpec
from flashformer.plan.plan import Stage

INPUTS = (
    "token_ids",
    "kv",
)  # exist before the first stage: the step's tokens, the past of the pages


def model_stages(spec: ModelSpec) -> tuple[Stage, ...]:
    """The schedule of one step.

    qkv, gate_up and lm_head normalise `hidden` on their way in; attention applies QK-norm and RoPE,
    stores the new keys and values, then attends; o_proj and down add to `hidden`.
    """
    stages = [Stage("embed", -1, ("token_ids",), ("hidden",))]
    for layer in range(spec.num_layers):
        stages += [
            Stage("qkv", layer, ("hidden",), ("qkv",)),
            Stage("attention", layer, ("qkv", "kv"), ("kv", "attended")),
            Stage("o_proj", layer, ("attended", "hidden"), ("hidden",)),
            Stage("gate_up", layer, ("hidden",), ("activated",)),
            Stage("down", layer, ("activated", "hidden"), ("hidden",)),
        ]
    stages += [
        Stage("lm_head", -1, ("hidden",), ("logits",)),
        Stage("sample", -1, ("logits",), ("argmax",)),
    ]
    return tuple(stages)
