"""`/v1/completions`: what a request may hold.

body -> `Asked`
"""

from typing import Any

from flashformer.engine import checks
from flashformer.engine.sampling import MAX_LOGPROBS
from flashformer.errors import ParameterError
from flashformer.serve.protocol.asked import Asked, read_request, refusing
from flashformer.serve.protocol.body import read_body
from flashformer.serve.protocol.chat import (
    RESPONSE_FORMAT,
    STREAM_OPTIONS,
    STRUCTURED_OUTPUTS,
    one_shape,
    stream_usage,
)
from flashformer.serve.protocol.common_fields import (
    CHOICE,
    END,
    MODEL,
    NUM_SEQUENCES,
    PROMPT_LOGPROBS,
    STOP,
    STREAM,
    sampled,
)
from flashformer.serve.protocol.completion_answer import CompletionAnswer, CompletionHeader
from flashformer.serve.protocol.fields import (
    MAX_TEXT_BYTES,
    Field,
    Values,
    boolean,
    integer,
    refuse,
    sampling_params,
)
from flashformer.serve.protocol.formats import AnswerFormat
from flashformer.serve.protocol.rules import AnswerRules
from flashformer.serve.server.endpoint import Prompt, TextPrompt
from flashformer.serve.server.messages import ModelInfo

MAX_PROMPTS = 128
MAX_PROMPT_IDS = 1 << 20


def read_prompts(name: str, value: object) -> list[str | tuple[int, ...]]:
    """A text, token ids, or an array of either."""
    if isinstance(value, str):
        return [checks.text(name, value, MAX_TEXT_BYTES)]
    if not isinstance(value, list):
        raise ParameterError(
            name, f"must be a string, token ids or an array of them, not {checks.shown(value)}"
        )
    if value and type(value[0]) in (int, float, bool):
        return [checks.token_ids(name, value, MAX_PROMPT_IDS)]
    if not 1 <= len(value) <= MAX_PROMPTS:
        raise ParameterError(name, f"must hold 1 to {MAX_PROMPTS} prompts, not {len(value)}")
    return [_prompt(f"{name}[{place}]", entry) for place, entry in enumerate(value)]


def _prompt(where: str, value: object) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return checks.text(where, value, MAX_TEXT_BYTES)
    return checks.token_ids(where, value, MAX_PROMPT_IDS)


FIELDS = (
    MODEL,
    Field(
        "prompt",
        f"a string, an array of token ids, or an array of up to {MAX_PROMPTS} of either",
        "what to continue",
        read_prompts,
        required=True,
    ),
    STREAM,
    STREAM_OPTIONS,
    Field(
        "max_tokens",
        "0 or more",
        "the longest answer; without it, to the end of the context; 0 only with `echo`",
        integer(0, 2**31 - 1),
    ),
    NUM_SEQUENCES,
    Field("best_of", "the value of `n`", "nothing is ranked here", integer(1, 8)),
    *CHOICE,
    sampled("stop", STOP, "end the answer before one of these"),
    *END,
    sampled("logprobs", f"0 to {MAX_LOGPROBS}", "how many of the likeliest tokens to report"),
    PROMPT_LOGPROBS,
    Field("echo", "true or false", "begin with the prompt", boolean, default=False),
    Field(
        "add_special_tokens",
        "true or false",
        "tokenise texts with the tokenizer's own first tokens",
        boolean,
        default=True,
    ),
    RESPONSE_FORMAT,
    STRUCTURED_OUTPUTS,
    Field("suffix", "nothing", "refused", refuse("is not possible: text is only continued")),
)


@refusing()
def parse_completion(body: bytes, info: ModelInfo) -> Asked:
    """Check a request of `/v1/completions`."""
    values = read_request(FIELDS, read_body(body), info)
    given = values["prompt"]
    scoring = values["max_tokens"] == 0
    if scoring and not values["echo"]:
        raise ParameterError("max_tokens", "must be at least 1 without echo")
    params = sampling_params(FIELDS, values, info, **_fixed(values, scoring))
    if values["best_of"] not in (None, params.n):
        raise ParameterError(
            "best_of", f"must equal n, which is {params.n}: nothing is ranked here"
        )
    if len(given) * params.n > MAX_PROMPTS:
        raise ParameterError("n", f"asks for more than {MAX_PROMPTS} texts of all prompts together")
    rules = AnswerRules(AnswerFormat(), shape=one_shape(values))
    header = CompletionHeader(
        model=info.model_id,
        fingerprint=info.fingerprint,
        n=params.n,
        num_logprobs=params.logprobs,
        echo=values["echo"],
        scoring=scoring,
        shows_prompt_logprobs=values["prompt_logprobs"] is not None,
        **stream_usage(values),
        bos_token_id=info.bos_token_id,
    )
    special = values["add_special_tokens"]
    prompts: list[Prompt] = [
        TextPrompt(prompt, special) if isinstance(prompt, str) else prompt for prompt in given
    ]
    texts = [prompt if isinstance(prompt, str) else None for prompt in given]
    return Asked(
        stream=values["stream"],
        prompts=prompts,
        params=params,
        rules=rules,
        make=lambda ids, decode: CompletionAnswer(header, texts, ids, decode),
    )


def _fixed(values: Values, scoring: bool) -> dict[str, Any]:
    """Parameters that follow from other fields: scoring takes a token that is not shown."""
    fixed: dict[str, Any] = {"max_tokens": 1 if scoring else values["max_tokens"]}
    if scoring:
        fixed["min_tokens"] = 0
    if values["echo"] and values["logprobs"] is not None:
        fixed["prompt_logprobs"] = values["logprobs"]
    return fixed
