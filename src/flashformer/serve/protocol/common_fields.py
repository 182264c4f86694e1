"""The fields that several routes share."""

from flashformer.engine.sampling import (
    MAX_BIASED_IDS,
    MAX_LOGPROBS,
    MAX_SEQUENCES,
    MAX_STOP_BYTES,
    MAX_STOP_IDS,
    MAX_STOP_STRINGS,
)
from flashformer.serve.protocol.fields import MAX_NAME_BYTES, Field, as_given, boolean, string


def sampled(
    name: str, accepts: str, meaning: str, parameter: str | None = None, *aliases: str
) -> Field:
    """A field that is a parameter of `SamplingParams`, of the same name if none is given."""
    return Field(name, accepts, meaning, as_given, parameter=parameter or name, aliases=aliases)


STOP = f"a string or up to {MAX_STOP_STRINGS}, each of at most {MAX_STOP_BYTES} bytes"

MODEL = Field(
    "model",
    f"a string of at most {MAX_NAME_BYTES} bytes",
    "the served model's name; without it the served model answers",
    string(MAX_NAME_BYTES),
)
STREAM = Field("stream", "true or false", "answer as server-sent events", boolean, default=False)
NUM_SEQUENCES = sampled("n", f"1 to {MAX_SEQUENCES}", "independent answers to each prompt")

# How tokens are chosen; OpenAI's and Anthropic's names first, then those of local servers.
CHOICE = (
    sampled("temperature", "0 to 100", "0 takes the likeliest token always"),
    sampled("top_p", "above 0, up to 1", "the likeliest tokens that reach this probability"),
    sampled("top_k", "-1 or more", "the likeliest tokens by number; 0 and -1: all"),
    sampled("min_p", "0 to 1", "tokens at least this likely, relative to the likeliest"),
    sampled("presence_penalty", "-2 to 2", "less of what has occurred in the answer"),
    sampled("frequency_penalty", "-2 to 2", "the same, by how often it has occurred"),
    sampled("repetition_penalty", "0.01 to 10", "less of what has occurred anywhere"),
    sampled("seed", "0 to 2^64 - 1", "the same seed gives the same answer, at any load"),
    sampled(
        "logit_bias",
        f"an object of up to {MAX_BIASED_IDS} token ids to -100 to 100",
        "added to logits",
    ),
    sampled("allowed_token_ids", "an array of token ids", "only these can be chosen"),
)
END = (
    sampled("stop_token_ids", f"an array of up to {MAX_STOP_IDS} token ids", "end the answer"),
    sampled("min_tokens", "0 or more", "no end before so many tokens"),
    sampled("ignore_eos", "true or false", "go on behind end-of-sequence tokens"),
    sampled("skip_special_tokens", "true or false", "leave special tokens out of the text"),
    sampled("include_stop_str_in_output", "true or false", "keep the stop string in the text"),
)
PROMPT_LOGPROBS = sampled(
    "prompt_logprobs",
    f"0 to {MAX_LOGPROBS}",
    "logprobs of the prompt's tokens, in `prompt_logprobs`",
)
