"""`/v1/responses`, without a memory: what a request may hold.

body -> `Asked`
"""

from typing import Any

from flashformer.engine import checks
from flashformer.engine.sampling import MAX_LOGPROBS
from flashformer.errors import ParameterError
from flashformer.serve.protocol.asked import Asked, read_request, refusing, require_template
from flashformer.serve.protocol.body import read_body
from flashformer.serve.protocol.chat import (
    EFFORTS,
    PARALLEL_TOOL_CALLS,
    STRUCTURED_OUTPUTS,
    TEMPLATE_KWARGS_FIELD,
    answer_rules,
    conversation_prompt,
    shown_tokens,
)
from flashformer.serve.protocol.common_fields import CHOICE, END, MODEL, STOP, STREAM, sampled
from flashformer.serve.protocol.fields import (
    MAX_TEXT_BYTES,
    Field,
    integer,
    items,
    mapping,
    one_of,
    refuse,
    sampling_params,
    string,
)
from flashformer.serve.protocol.formats import answer_format
from flashformer.serve.protocol.response_answer import ResponseAnswer, ResponseHeader
from flashformer.serve.protocol.response_input import read_input
from flashformer.serve.protocol.shapes import text_format
from flashformer.serve.protocol.tools import openai_choice, responses_tools, tool_use
from flashformer.serve.server.messages import Grammar, ModelInfo

_WITH_LOGPROBS = "message.output_text.logprobs"
_STATELESS = "is not possible: the server keeps no responses; send the whole conversation as input"


def _text(name: str, value: object) -> Grammar | None:
    form = mapping(name, value).get("format")
    return None if form is None else text_format(f"{name}.format", form)


def _reasoning(name: str, value: object) -> str | None:
    effort = mapping(name, value).get("effort")
    if effort is not None:
        one_of(*EFFORTS)(f"{name}.effort", effort)
    return effort


def _include(name: str, value: object) -> list[str]:
    return [checks.text(name, entry, 256) for entry in items(name, value, 32, 0)]


FIELDS = (
    MODEL,
    Field(
        "input",
        "a string, or an array of messages, function calls and their outputs",
        "the conversation",
        read_input,
        required=True,
    ),
    Field("instructions", "a string", "a system message before the input", string(MAX_TEXT_BYTES)),
    STREAM,
    sampled("max_output_tokens", "1 or more", "the longest answer", "max_tokens"),
    *CHOICE,
    sampled("stop", STOP, "end the answer before one of these"),
    *END,
    Field("tools", "an array of functions", "what the model may call", responses_tools),
    Field(
        "tool_choice", "none, auto, required or a function", "whether it must call", openai_choice
    ),
    PARALLEL_TOOL_CALLS,
    Field("text", "an object", "`format`: text, json_object, json_schema or regex", _text),
    STRUCTURED_OUTPUTS,
    Field("reasoning", "an object", "`effort`: a variable of the chat template", _reasoning),
    TEMPLATE_KWARGS_FIELD,
    Field(
        "include",
        "an array of strings",
        f"`{_WITH_LOGPROBS}`: report logprobs",
        _include,
        default=[],
    ),
    Field(
        "top_logprobs",
        f"0 to {MAX_LOGPROBS}",
        "how many of the likeliest tokens to report",
        integer(0, MAX_LOGPROBS),
    ),
    Field("previous_response_id", "nothing", "refused", refuse(_STATELESS)),
    Field("conversation", "nothing", "refused", refuse(_STATELESS)),
    Field("prompt", "nothing", "refused", refuse("is not possible: there are no stored prompts")),
    Field("background", "false", "refused otherwise", refuse(_STATELESS)),
)


@refusing()
def parse_response(body: bytes, info: ModelInfo) -> Asked:
    """Check a request of `/v1/responses`."""
    content = read_body(body)
    values = read_request(FIELDS, content, info)
    require_template(info, "input")
    form = answer_format(info.chat_template)
    use = tool_use(values["tools"], values["tool_choice"], parallel=values["parallel_tool_calls"])
    if values["text"] is not None and values["structured_outputs"] is not None:
        raise ParameterError("structured_outputs", "and text.format exclude each other")
    rules = answer_rules(use, values["text"] or values["structured_outputs"], form)
    logprobs = values["top_logprobs"]
    if _WITH_LOGPROBS in values["include"]:
        logprobs = logprobs or 0
    fixed: dict[str, Any] = {"logprobs": logprobs}
    if values["skip_special_tokens"] is None:
        fixed["skip_special_tokens"] = shown_tokens(form, use)
    params = sampling_params(FIELDS, values, info, **fixed)
    messages = values["input"]
    if values["instructions"] is not None:
        messages = [{"role": "system", "content": values["instructions"]}, *messages]
    prompt = conversation_prompt(
        messages, use, values["chat_template_kwargs"], effort=values["reasoning"]
    )
    header = ResponseHeader(info.model_id, params, content, logprobs)
    return Asked(
        stream=values["stream"],
        prompts=[prompt],
        params=params,
        rules=rules,
        make=lambda prompts, decode: ResponseAnswer(header, rules, prompts[0], decode),
    )
