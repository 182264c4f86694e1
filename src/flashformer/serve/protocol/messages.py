"""`/v1/messages`, Anthropic's API: what a request may hold.

body -> `Asked`; for `count_tokens`, the conversation alone
"""

from typing import Any

from flashformer.engine import checks
from flashformer.errors import ParameterError
from flashformer.serve.protocol.asked import Asked, read_request, refusing, require_template
from flashformer.serve.protocol.body import read_body
from flashformer.serve.protocol.chat import (
    STRUCTURED_OUTPUTS,
    TEMPLATE_KWARGS_FIELD,
    answer_rules,
    conversation_prompt,
    shown_tokens,
)
from flashformer.serve.protocol.common_fields import CHOICE, END, MODEL, STOP, STREAM, sampled
from flashformer.serve.protocol.fields import Field, Values, mapping, sampling_params
from flashformer.serve.protocol.formats import answer_format
from flashformer.serve.protocol.message_answer import MessageAnswer
from flashformer.serve.protocol.message_input import anthropic_messages, system_text
from flashformer.serve.protocol.tools import ToolUse, anthropic_choice, anthropic_tools, tool_use
from flashformer.serve.server.endpoint import ChatPrompt
from flashformer.serve.server.messages import ModelInfo


def _thinking(name: str, value: object) -> bool | None:
    kind = mapping(name, value).get("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise ParameterError(
            f"{name}.type", f"must be enabled, disabled or adaptive, not {checks.shown(kind)}"
        )
    return None if kind == "adaptive" else kind == "enabled"


_CONVERSATION = (
    MODEL,
    Field(
        "messages",
        "an array of messages",
        "the conversation; a last message of the assistant is continued",
        anthropic_messages,
        required=True,
    ),
    Field("system", "a string or text blocks", "a system message", system_text),
    Field("tools", "an array of tools", "what the model may call", anthropic_tools),
    Field(
        "tool_choice",
        "an object with a type: auto, any, tool or none",
        "whether it must call; any and tool are held by a grammar",
        anthropic_choice,
    ),
    Field(
        "thinking",
        "an object with a type: enabled, disabled or adaptive",
        "`enable_thinking` of the chat template; adaptive leaves its default",
        _thinking,
    ),
    TEMPLATE_KWARGS_FIELD,
)
FIELDS = (
    *_CONVERSATION,
    Field(
        "max_tokens",
        "1 or more",
        "the longest answer",
        lambda name, value: checks.integer(name, value, 1, 2**31 - 1),
        required=True,
        parameter="max_tokens",
    ),
    STREAM,
    *CHOICE,
    sampled("stop_sequences", STOP, "end the answer before one of these", "stop"),
    *END,
    STRUCTURED_OUTPUTS,
)
COUNT_FIELDS = _CONVERSATION


@refusing()
def parse_count(body: bytes, info: ModelInfo) -> ChatPrompt:
    """The conversation of `/v1/messages/count_tokens`."""
    values = read_request(COUNT_FIELDS, read_body(body), info)
    require_template(info, "messages")
    return _prompt(values, _use(values))


def _use(values: Values) -> ToolUse:
    choice = values["tool_choice"]
    if choice is None:
        return tool_use(values["tools"], None, parallel=True)
    mode, called, parallel = choice
    return tool_use(values["tools"], (mode, called), parallel=parallel)


def _prompt(values: Values, use: ToolUse) -> ChatPrompt:
    messages: list[dict[str, Any]] = values["messages"]
    if values["system"]:
        messages = [{"role": "system", "content": values["system"]}, *messages]
    variables = values["chat_template_kwargs"]
    if values["thinking"] is not None:
        variables = {"enable_thinking": values["thinking"], **variables}
    last = messages[-1]
    continued = last["role"] == "assistant" and not last.get("tool_calls")
    return conversation_prompt(messages, use, variables, continued=continued)


@refusing()
def parse_message(body: bytes, info: ModelInfo) -> Asked:
    """Check a request of `/v1/messages`."""
    values = read_request(FIELDS, read_body(body), info)
    require_template(info, "messages")
    form = answer_format(info.chat_template)
    use = _use(values)
    rules = answer_rules(use, values["structured_outputs"], form)
    fixed: dict[str, Any] = {}
    if values["skip_special_tokens"] is None:
        fixed["skip_special_tokens"] = shown_tokens(form, use)
    params = sampling_params(FIELDS, values, info, **fixed)
    return Asked(
        stream=values["stream"],
        prompts=[_prompt(values, use)],
        params=params,
        rules=rules,
        make=lambda prompts, decode: MessageAnswer(info.model_id, rules, prompts[0], decode),
    )
