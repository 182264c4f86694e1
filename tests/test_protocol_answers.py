"""Answers with reasoning and tool calls, read by the official clients from a recorded stream."""

import json

import anthropic
import httpx2
import openai
import pytest

from flashformer.serve.protocol.chat import parse_chat
from flashformer.serve.protocol.completions import parse_completion
from flashformer.serve.protocol.messages import parse_message
from flashformer.serve.protocol.responses import parse_response
from flashformer.serve.server.endpoint import RequestError
from flashformer.serve.server.messages import GenerateEvent
from test_protocol_fields import CHAT, INFO

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]
FLAT = [{"type": "function", "name": "f", "parameters": PARAMETERS}]
CLAUDE = [{"name": "f", "input_schema": PARAMETERS}]
SAID = (
    "<think>\nI must call.\n</think>\n\nOne moment.\n<tool_call>\n"
    '{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n'
    '{"name": "f", "arguments": {"a": 2}}\n</tool_call>'
)
MODEL = "{{ messages }} {{ tools }} <tool_call> <think> </think>"
NUM_THOUGHTS = SAID.index("</think>") // 3 + 3  # events of three characters, up to the tag's end


def events_of(text, size=3, finish="stop", **more):
    """One event for every few characters, then the end."""
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    yield from (GenerateEvent(0, 0, part, (7,), cached_tokens=2) for part in parts)
    yield GenerateEvent(0, 0, "", (1,), finish_reason=finish, cached_tokens=2, **more)


def answer(endpoint, body, events):
    """(content type, what the server would send)."""
    from dataclasses import replace

    parsed = endpoint(json.dumps(body).encode(), replace(INFO, chat_template=MODEL))
    responder = parsed.responder([(5, 6, 7)], lambda ids: "hello")
    texts = responder.begin()
    for event in events:
        if isinstance(event, RequestError):
            return "text/event-stream", "".join(texts + responder.fail(event))
        texts = texts + responder.add(event)
    if parsed.stream:
        return "text/event-stream", "".join(texts + responder.end())
    return "application/json", json.dumps(responder.body())


def client_of(kind, endpoint, events):
    """An official client whose server answers every request with these events."""

    def respond(request):
        content_type, text = answer(endpoint, json.loads(request.content), events)
        return httpx2.Response(200, headers={"content-type": content_type}, text=text)

    transport = httpx2.MockTransport(respond)
    return kind(
        api_key="none", base_url="http://x/v1", http_client=httpx2.Client(transport=transport)
    )


def chat_client(events):
    return client_of(openai.OpenAI, parse_chat, events)


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_tells_reasoning_text_and_calls_apart(stream):
    client = chat_client(list(events_of(SAID)))
    wanted = {"model": "m", "messages": CHAT, "tools": TOOLS}
    if stream:
        with client.chat.completions.stream(
            **wanted, stream_options={"include_usage": True}
        ) as events:
            whole = events.get_final_completion()
    else:
        whole = client.chat.completions.create(**wanted)
    message = whole.choices[0].message
    assert message.content == "One moment."
    assert message.reasoning_content == "I must call."
    assert [json.loads(c.function.arguments) for c in message.tool_calls] == [{"a": 1}, {"a": 2}]
    assert len({call.id for call in message.tool_calls}) == 2
    assert whole.choices[0].finish_reason == "tool_calls"
    usage = whole.usage
    assert usage.completion_tokens == -(-len(SAID) // 3) + 1
    assert usage.completion_tokens_details.reasoning_tokens == NUM_THOUGHTS
    assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens) == (3, 2)


def test_calls_behind_the_first_are_dropped_where_only_one_is_wanted():
    client = chat_client(list(events_of(SAID)))
    whole = client.chat.completions.create(
        model="m", messages=CHAT, tools=TOOLS, parallel_tool_calls=False
    )
    assert len(whole.choices[0].message.tool_calls) == 1


def test_without_tools_a_call_is_text():
    client = chat_client(list(events_of(SAID)))
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        message = (
            client.chat.completions.create(model="m", messages=CHAT, **more).choices[0].message
        )
        assert message.tool_calls is None
        assert "<tool_call>" in message.content


def test_a_failure_in_a_stream_reaches_every_client():
    events = [*list(events_of("Hello"))[:2], RequestError(500, "the engine failed.", None, "x")]
    with pytest.raises(openai.APIError, match="the engine failed"):
        list(chat_client(events).chat.completions.create(model="m", messages=CHAT, stream=True))
    client = client_of(anthropic.Anthropic, parse_message, events)
    with pytest.raises(anthropic.APIError, match="the engine failed"):
        list(client.messages.create(model="m", max_tokens=9, messages=CHAT, stream=True))
    client = client_of(openai.OpenAI, parse_response, events)
    told = list(client.responses.create(model="m", input="hi", stream=True))
    assert [event.type for event in told[-2:]] == ["error", "response.failed"]
    assert told[-1].response.error.message == "the engine failed."


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_has_an_item_for_each_part(stream):
    client = client_of(openai.OpenAI, parse_response, list(events_of(SAID)))
    wanted = {"model": "m", "input": "hi", "tools": FLAT}
    if stream:
        with client.responses.stream(**wanted) as events:
            kinds = [event.type for event in events]
            whole = events.get_final_response()
        assert kinds.count("response.output_item.added") == 4
        assert kinds.count("response.output_item.done") == 4
        assert "response.reasoning_text.delta" in kinds
    else:
        whole = client.responses.create(**wanted)
    assert [item.type for item in whole.output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert whole.output[0].content[0].text == "I must call."
    assert whole.output_text == "One moment."
    assert json.loads(whole.output[3].arguments) == {"a": 2}
    assert {item.status for item in whole.output} == {"completed"}
    assert whole.usage.output_tokens_details.reasoning_tokens == NUM_THOUGHTS


@pytest.mark.parametrize("stream", [False, True])
def test_a_message_has_a_block_for_each_part(stream):
    client = client_of(anthropic.Anthropic, parse_message, list(events_of(SAID)))
    wanted = {"model": "m", "max_tokens": 99, "messages": CHAT, "tools": CLAUDE}
    if stream:
        with client.messages.stream(**wanted) as events:
            whole = events.get_final_message()
    else:
        whole = client.messages.create(**wanted)
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert whole.content[0].thinking == "I must call."
    assert whole.content[1].text == "One moment."
    assert [block.input for block in whole.content[2:]] == [{"a": 1}, {"a": 2}]
    assert whole.stop_reason == "tool_use"
    assert (whole.usage.input_tokens, whole.usage.cache_read_input_tokens) == (1, 2)


@pytest.mark.parametrize(
    ("finish", "stop_reason", "chat", "message"),
    [
        ("stop", None, "stop", ("end_turn", None)),
        ("stop", "END", "stop", ("stop_sequence", "END")),
        ("length", None, "length", ("max_tokens", None)),
    ],
)
def test_why_an_answer_ended(finish, stop_reason, chat, message):
    events = list(events_of("Hello", finish=finish, stop_reason=stop_reason))
    whole = chat_client(events).chat.completions.create(model="m", messages=CHAT)
    assert whole.choices[0].finish_reason == chat
    client = client_of(anthropic.Anthropic, parse_message, events)
    whole = client.messages.create(model="m", max_tokens=9, messages=CHAT)
    assert (whole.stop_reason, whole.stop_sequence) == message


def test_a_stream_of_either_api_has_the_usage_in_every_chunk_if_it_was_asked_for():
    wanted = {"include_usage": True, "continuous_usage_stats": True}
    for endpoint, body in (
        (parse_chat, {"messages": CHAT}),
        (parse_completion, {"prompt": "x"}),
    ):
        request = {**body, "stream": True, "stream_options": wanted}
        _, text = answer(endpoint, request, list(events_of("hello you")))
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["choices"]]
        assert counts == sorted(counts)
        assert counts[-1] == chunks[-1]["usage"]["completion_tokens"] == 4
