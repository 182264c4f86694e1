"""`/v1/chat/completions`: what a request may hold.

body -> `Asked`
"""

from typing import Any

from flashformer.engine.sampling import MAX_LOGPROBS
from flashformer.errors import ParameterError
from flashformer.serve.protocol.asked import Asked, read_request, refusing, require_template
from flashformer.serve.protocol.body import read_body
from flashformer.serve.protocol.chat_answer import ChatAnswer, ChatHeader
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
from flashformer.serve.protocol.conversation import (
    TEMPLATE_KWARGS,
    openai_messages,
    template_kwargs,
)
from flashformer.serve.protocol.fields import (
    Field,
    Values,
    boolean,
    integer,
    mapping,
    one_of,
    refuse,
    sampling_params,
)
from flashformer.serve.protocol.formats import AnswerFormat, answer_format
from flashformer.serve.protocol.rules import AnswerRules
from flashformer.serve.protocol.shapes import response_format, structured_outputs
from flashformer.serve.protocol.tools import ToolUse, openai_choice, openai_tools, tool_use
from flashformer.serve.server.endpoint import ChatPrompt
from flashformer.serve.server.messages import Grammar, ModelInfo

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def _stream_options(name: str, value: object) -> dict[str, bool]:
    options = mapping(name, value)
    return {
        key: boolean(f"{name}.{key}", options[key])
        for key in ("include_usage", "continuous_usage_stats")
        if options.get(key) is not None
    }


STREAM_OPTIONS = Field(
    "stream_options",
    "an object",
    "`include_usage`: a last chunk with the usage; `continuous_usage_stats`: it in every chunk",
    _stream_options,
    default={},
)
RESPONSE_FORMAT = Field(
    "response_format",
    "an object with a type: text, json_object, json_schema or regex",
    "the form of the answer, held by a grammar; regex has a `pattern`",
    response_format,
)
STRUCTURED_OUTPUTS = Field(
    "structured_outputs",
    "an object with one of json, json_object, regex, choice, grammar",
    "the same in vLLM's words; grammar is lark",
    structured_outputs,
)
PARALLEL_TOOL_CALLS = Field(
    "parallel_tool_calls",
    "true or false",
    "whether an answer may hold several calls",
    boolean,
    default=True,
)
TEMPLATE_KWARGS_FIELD = Field(
    "chat_template_kwargs",
    f"an object with names of {', '.join(TEMPLATE_KWARGS)}",
    "variables of the chat template",
    template_kwargs,
    default={},
)
CHAT_TEMPLATE = Field(
    "chat_template",
    "nothing",
    "refused: a template is a program",
    refuse("is not taken from requests: a template is a program; serve a checkpoint that has it"),
)
FIELDS = (
    MODEL,
    Field(
        "messages",
        "an array of messages",
        "the conversation: system, developer, user, assistant and tool; content is a string or an "
        "array of text parts",
        openai_messages,
        required=True,
    ),
    STREAM,
    STREAM_OPTIONS,
    sampled(
        "max_tokens",
        "1 or more",
        "the longest answer; without it, to the end of the context",
        "max_tokens",
        "max_completion_tokens",
    ),
    NUM_SEQUENCES,
    *CHOICE,
    sampled("stop", STOP, "end the answer before one of these"),
    *END,
    Field("logprobs", "true or false", "report logprobs", boolean, default=False),
    Field(
        "top_logprobs",
        f"0 to {MAX_LOGPROBS}",
        "how many of the likeliest tokens to report; needs `logprobs`",
        integer(0, MAX_LOGPROBS),
    ),
    PROMPT_LOGPROBS,
    Field("tools", "an array of functions", "what the model may call", openai_tools),
    Field(
        "tool_choice",
        "none, auto, required or a function",
        "whether it must call; required and a function are held by a grammar",
        openai_choice,
    ),
    PARALLEL_TOOL_CALLS,
    RESPONSE_FORMAT,
    STRUCTURED_OUTPUTS,
    Field(
        "reasoning_effort",
        ", ".join(EFFORTS),
        "a variable of the chat template; none also sets `enable_thinking` to false",
        one_of(*EFFORTS),
    ),
    TEMPLATE_KWARGS_FIELD,
    Field(
        "add_generation_prompt",
        "true or false",
        "begin an answer; default: unless the last message is continued",
        boolean,
    ),
    Field(
        "continue_final_message",
        "true or false",
        "go on in the last message instead of answering it",
        boolean,
        default=False,
    ),
    CHAT_TEMPLATE,
    Field("functions", "nothing", "refused", refuse("is replaced by tools; use tools")),
    Field("audio", "nothing", "refused", refuse("is not possible: the model writes text only")),
)


def chat_prompt(values: Values, use: ToolUse, messages: list[dict[str, Any]]) -> ChatPrompt:
    """The conversation with the variables of its template."""
    return conversation_prompt(
        messages,
        use,
        values["chat_template_kwargs"],
        effort=values["reasoning_effort"],
        continued=values["continue_final_message"],
        generation_prompt=values["add_generation_prompt"],
    )


def conversation_prompt(
    messages: list[dict[str, Any]],
    use: ToolUse,
    variables: dict[str, Any],
    *,
    effort: str | None = None,
    continued: bool = False,
    generation_prompt: bool | None = None,
) -> ChatPrompt:
    """A `ChatPrompt`; tools that must not be called are not shown."""
    if continued and generation_prompt:
        raise ParameterError(
            "add_generation_prompt", "begins an answer, but continue_final_message goes on in one"
        )
    if effort is not None:
        variables = {"reasoning_effort": effort, **variables}
        if effort == "none":
            variables.setdefault("enable_thinking", False)
    return ChatPrompt(
        messages=messages,
        tools=[tool.for_template() for tool in use.tools] if use.active else None,
        add_generation_prompt=not continued if generation_prompt is None else generation_prompt,
        continue_final_message=continued,
        template_kwargs=variables,
    )


def answer_rules(use: ToolUse, shape: Grammar | None, form: AnswerFormat) -> AnswerRules:
    """The rules, if an answer can follow them."""
    rules = AnswerRules(form, use, shape)
    rules.check()
    return rules


def shown_tokens(form: AnswerFormat, use: ToolUse) -> bool | None:
    """`skip_special_tokens` where the marks of a call are special tokens."""
    return False if use.active and form.hides_calls else None


def one_shape(values: Values) -> Grammar | None:
    """`response_format` or `structured_outputs`."""
    first, second = values["response_format"], values["structured_outputs"]
    if first is not None and second is not None:
        raise ParameterError("structured_outputs", "and response_format exclude each other")
    shape: Grammar | None = second if first is None else first
    return shape


def num_logprobs(values: Values) -> int | None:
    """What `logprobs` and `top_logprobs` ask for."""
    if values["logprobs"]:
        return values["top_logprobs"] or 0
    if values["top_logprobs"]:
        raise ParameterError("top_logprobs", "needs logprobs to be true")
    return None


def stream_usage(values: Values) -> dict[str, bool]:
    """Where a stream tells its usage, for the header of its answer."""
    options = values["stream_options"]
    if options and not values["stream"]:
        raise ParameterError("stream_options", "needs stream to be true")
    return {
        "include_usage": options.get("include_usage", False),
        "usage_always": options.get("continuous_usage_stats", False),
    }


@refusing()
def parse_chat(body: bytes, info: ModelInfo) -> Asked:
    """Check a request of `/v1/chat/completions`."""
    values = read_request(FIELDS, read_body(body), info)
    require_template(info, "messages")
    form = answer_format(info.chat_template)
    use = tool_use(values["tools"], values["tool_choice"], parallel=values["parallel_tool_calls"])
    rules = answer_rules(use, one_shape(values), form)
    logprobs = num_logprobs(values)
    fixed: dict[str, Any] = {"logprobs": logprobs}
    if values["skip_special_tokens"] is None:
        fixed["skip_special_tokens"] = shown_tokens(form, use)
    params = sampling_params(FIELDS, values, info, **fixed)
    header = ChatHeader(
        model=info.model_id,
        fingerprint=info.fingerprint,
        num_logprobs=logprobs,
        **stream_usage(values),
    )
    return Asked(
        stream=values["stream"],
        prompts=[chat_prompt(values, use, values["messages"])],
        params=params,
        rules=rules,
        make=lambda prompts, decode: ChatAnswer(header, rules, params.n, prompts[0], decode),
    )
