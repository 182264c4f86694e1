"""A prompt checked against the model and the room that there is.

token ids -> a tuple of ints inside the vocabulary, not empty, or the `UsageError` that says why not
"""

from collections.abc import Sequence

from flashformer.engine.kv_cache import KvCache
from flashformer.engine.sampling import SamplingParams
from flashformer.errors import ContextLengthError, ParameterError, UsageError
from flashformer.model.spec import ModelSpec


def check_prompt(prompt_token_ids: Sequence[int], spec: ModelSpec) -> tuple[int, ...]:
    """Token ids as a tuple of ints inside the vocabulary, not empty."""
    prompt = tuple(prompt_token_ids)
    if not prompt:
        if spec.bos_token_id is None:
            raise UsageError(
                "the prompt is empty and the model has no beginning-of-sequence token to start "
                "from; give at least one token."
            )
        return (spec.bos_token_id,)
    for place, token_id in enumerate(prompt):
        if isinstance(token_id, bool) or not hasattr(token_id, "__index__"):
            raise UsageError(
                f"a prompt's token ids must be integers, but number {place} is a "
                f"{type(token_id).__name__}."
            )
        if not 0 <= token_id < spec.vocab_size:
            raise UsageError(
                f"token id {token_id} at place {place} of the prompt is outside the model's "
                f"vocabulary of {spec.vocab_size}."
            )
    return tuple(int(token_id) for token_id in prompt)


def check_room(
    prompt: Sequence[int], params: SamplingParams, context: int, kv_cache: KvCache
) -> None:
    """`UsageError` unless the prompt and what is wanted of it can ever fit."""
    room = context - len(prompt)
    if room < 1:
        raise ContextLengthError(
            f"the prompt has {len(prompt)} tokens, but the context holds {context} and "
            "must keep room for at least one new token; shorten the prompt or load the model "
            "with a larger context."
        )
    if params.min_tokens > room:
        raise ParameterError(
            "min_tokens",
            f"asks for {params.min_tokens} tokens, but a prompt of {len(prompt)} tokens leaves "
            f"room for {room} in the context of {context}",
        )
    most = len(prompt) + min(room, params.max_tokens or room) - 1
    if kv_cache.pages_for(most) > kv_cache.num_pages:
        raise ContextLengthError(
            f"{most} positions need {kv_cache.pages_for(most)} KV pages, but there are "
            f"{kv_cache.num_pages}; shorten the prompt or lower max_tokens."
        )
