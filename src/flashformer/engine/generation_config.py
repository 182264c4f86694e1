"""What a checkpoint's generation_config.json says about sampling and about the end of a text.

generation_config.json -> `GenerationDefaults`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashformer.engine.sampling import SamplingParams
from flashformer.errors import CheckpointError, ParameterError

_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Parameters of requests that name none, and which of them the checkpoint chose."""

    params: SamplingParams
    from_checkpoint: Mapping[str, Any]  # field of SamplingParams -> value
    eos_token_ids: tuple[int, ...]


def read_generation_config(config: Mapping[str, Any], vocab_size: int) -> GenerationDefaults:
    """Read the file's object ({} if there is none); `CheckpointError` for values out of range.

    As in Hugging Face, text is sampled only where the file says `do_sample`; otherwise it is
    greedy.
    """
    sampled = config.get("do_sample") is True
    names = _NAMES if sampled else ("repetition_penalty",)
    chosen = {name: config[name] for name in names if config.get(name) is not None}
    if config.get("do_sample") is False:
        chosen["temperature"] = 0.0
    try:
        params = SamplingParams(**(chosen if sampled else {"temperature": 0.0, **chosen}))
    except ParameterError as error:
        raise CheckpointError(
            f"generation_config.json is not usable: {error}; mend or remove the file."
        ) from None
    return GenerationDefaults(params, chosen, _eos_token_ids(config, vocab_size))


def _eos_token_ids(config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise CheckpointError(
                f"generation_config.json names the end token {token_id!r:.40}, but token ids go "
                f"from 0 to {vocab_size - 1}; mend or remove the file."
            )
    return tuple(ids)
