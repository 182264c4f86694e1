"""The official clients of OpenAI and Anthropic, unpatched, against every endpoint over loopback."""

import json
from itertools import combinations

import anthropic
import openai
import pytest
from openai import BadRequestError, NotFoundError

from flashformer.serve.load import LoadOptions
from flashformer.serve.server.routes import ENDPOINTS
from flashformer.serve.server.settings import ServeOptions
from serving import Serving

CHAT = [{"role": "user", "content": "Hello there"}]
SAMPLED = {"seed": 3, "temperature": 1.0}
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}


@pytest.fixture(scope="module")
def serving(checkpoint):
    folder = str(checkpoint("llama"))
    load = LoadOptions(folder, "reference", None, 512, None, max_batch=8)
    options = ServeOptions(load=load, name="tiny", port=0, seed=0)
    with Serving(options, ENDPOINTS) as running:
        yield running
        assert running.wait_idle()


@pytest.fixture(scope="module")
def client(serving):
    url = f"http://127.0.0.1:{serving.port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def claude(serving):
    url = f"http://127.0.0.1:{serving.port}"
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_the_model_is_listed_for_both_clients(client, claude):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    assert [model.id for model in claude.models.list()] == ["tiny"]
    assert claude.models.retrieve("tiny").display_name == "tiny"
    with pytest.raises(NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("n", [1, 3])
def test_a_streamed_chat_is_the_whole_chat(client, n):
    wanted = {"model": "tiny", "messages": CHAT, "max_tokens": 9, "n": n, **SAMPLED}
    wanted |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**wanted)
    chunks = list(
        client.chat.completions.create(
            **wanted, stream=True, stream_options={"include_usage": True}
        )
    )
    assert [c.choices[0].delta.role for c in chunks[:n]] == ["assistant"] * n
    *chunks, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        own = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        reasons = [c.finish_reason for c in own if c.finish_reason is not None]
        assert reasons == [choice.finish_reason]
        told = [entry for c in own if c.logprobs for entry in c.logprobs.content]
        assert told == choice.logprobs.content
        assert all(len(entry.top_logprobs) == 2 for entry in told)
    assert whole.system_fingerprint == chunks[0].system_fingerprint


def test_the_same_prompt_again_comes_from_the_cache(client):
    messages = [{"role": "user", "content": "a rather long text for the cache " * 8}]
    wanted = {"model": "tiny", "messages": messages, "max_tokens": 2}
    client.chat.completions.create(**wanted)
    again = client.chat.completions.create(**wanted)
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_a_stop_string_ends_a_chat(client):
    wanted = {"model": "tiny", "messages": CHAT, "max_tokens": 40, **SAMPLED}
    text = client.chat.completions.create(**wanted).choices[0].message.content
    stop = text[5:7]
    cut = client.chat.completions.create(**wanted, stop=[stop]).choices[0]
    assert cut.message.content == text[: text.index(stop)]
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_fits_its_schema(client, choice, stream):
    wanted = {"model": "tiny", "messages": CHAT, "tools": [TOOL], "tool_choice": choice}
    wanted |= {"parallel_tool_calls": False, "max_tokens": 200, **SAMPLED}
    if stream:
        with client.chat.completions.stream(**wanted) as events:
            answer = events.get_final_completion().choices[0]
    else:
        answer = client.chat.completions.create(**wanted).choices[0]
    (call,) = answer.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    assert answer.finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_structured_chats_fit_their_schema(client, stream):
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER}}
    wanted = {"model": "tiny", "messages": CHAT, "response_format": form, "max_tokens": 300}
    answer = client.chat.completions.create(**wanted, stream=stream, **SAMPLED)
    if stream:
        text = "".join(c.choices[0].delta.content or "" for c in answer)
    else:
        assert answer.choices[0].finish_reason == "stop"
        text = answer.choices[0].message.content
    assert json.loads(text)["city"] in ("Paris", "Rome")


def test_a_regular_expression_and_a_choice_hold(client):
    wanted = {"model": "tiny", "messages": CHAT, "max_tokens": 50, **SAMPLED}
    form = {"type": "regex", "pattern": "[0-9]{3}-(ab|cd)"}
    answer = client.chat.completions.create(**wanted, response_format=form)
    assert len(answer.choices[0].message.content) == 6
    extra = {"structured_outputs": {"choice": ["yes", "no"]}}
    answer = client.chat.completions.create(**wanted, extra_body=extra)
    assert answer.choices[0].message.content in ("yes", "no")


def test_errors_reach_the_client_with_their_field(client):
    wanted = {"model": "tiny", "messages": CHAT}
    schema = {"type": "json_schema", "json_schema": {"name": "w", "schema": {"type": "nonsense"}}}
    for more, field in (
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"response_format": schema}, "response_format.json_schema.schema"),
        ({"tools": [TOOL]}, "tools"),
        ({"messages": []}, "messages"),
    ):
        with pytest.raises(BadRequestError) as caught:
            client.chat.completions.create(**{**wanted, **more})
        assert caught.value.param == field
    long = [{"role": "user", "content": "word " * 2000}]
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=long, stream=True)
    assert caught.value.code == "context_length_exceeded"


def test_completions_of_texts_and_token_ids(client):
    wanted = {"model": "tiny", "max_tokens": 6, "logprobs": 2, **SAMPLED}
    prompts = ["One token", "The weights"]
    whole = client.completions.create(prompt=prompts, n=2, **wanted)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = ["", "", "", ""]
    for chunk in client.completions.create(prompt=prompts, n=2, stream=True, **wanted):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    ids = client.completions.create(prompt=[[5, 6, 7], [8]], **wanted)
    assert len(ids.choices) == 2
    assert len(ids.choices[0].logprobs.tokens) == 6


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_an_echoed_prompt_has_its_logprobs(client, max_tokens):
    wanted = {"model": "tiny", "prompt": "One token takes", "echo": True, "logprobs": 1}
    wanted |= {"max_tokens": max_tokens, "temperature": 0}
    answer = client.completions.create(**wanted)
    (choice,) = answer.choices
    assert choice.text.startswith("One token takes")
    assert choice.logprobs.token_logprobs[0] is None
    assert "".join(choice.logprobs.tokens) == choice.text
    places = zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True)
    assert all(choice.text[at:].startswith(token) for at, token in places)
    assert answer.usage.completion_tokens == max_tokens
    text = ""
    tokens = []
    for chunk in client.completions.create(**wanted, stream=True):
        text += chunk.choices[0].text
        if chunk.choices[0].logprobs is not None:
            tokens += chunk.choices[0].logprobs.tokens
    assert (text, tokens) == (choice.text, choice.logprobs.tokens)


def test_a_streamed_response_is_the_whole_response(client):
    wanted = {"model": "tiny", "input": "Hello there", "max_output_tokens": 8, **SEED}
    whole = client.responses.create(**wanted)
    assert whole.status == "incomplete"
    assert whole.incomplete_details.reason == "max_output_tokens"
    events = list(client.responses.create(**wanted, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage == whole.usage


SEED = {"extra_body": {"seed": 3}, "temperature": 1.0}


def test_a_response_calls_a_function_and_hears_its_output(client):
    tool = {"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": True}
    wanted = {"model": "tiny", "tools": [tool], "tool_choice": "required", **SEED}
    wanted |= {"parallel_tool_calls": False, "input": [{"role": "user", "content": "Weather?"}]}
    with client.responses.stream(**wanted) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    (call,) = answer.output
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    history = [
        *wanted["input"],
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    after = client.responses.create(
        model="tiny", input=history, instructions="Be brief.", max_output_tokens=4
    )
    assert after.output[0].type == "message"


def test_a_response_fits_its_schema(client):
    form = {"format": {"type": "json_schema", "name": "w", "schema": WEATHER, "strict": True}}
    answer = client.responses.create(model="tiny", input="Hi", text=form, **SEED)
    assert answer.status == "completed"
    assert json.loads(answer.output_text)["city"] in ("Paris", "Rome")
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(model="tiny", input="Hi", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"


def test_a_streamed_message_is_the_whole_message(claude):
    wanted = {"model": "tiny", "max_tokens": 8, "messages": CHAT}
    wanted |= {"system": "Be brief.", "extra_body": SAMPLED}
    whole = claude.messages.create(**wanted)
    assert whole.stop_reason == "max_tokens"
    with claude.messages.stream(**wanted) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text == text
    assert final.usage.output_tokens == whole.usage.output_tokens == 8
    counted = claude.messages.count_tokens(
        model="tiny", messages=CHAT, system="Be brief."
    ).input_tokens
    assert counted == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


def test_a_message_stops_calls_and_continues(claude):
    tool = {"name": "get_weather", "input_schema": WEATHER}
    wanted = {"model": "tiny", "max_tokens": 200, "messages": CHAT, "tools": [tool]}
    wanted |= {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    with claude.messages.stream(**wanted, extra_body=SAMPLED) as stream:
        answer = stream.get_final_message()
    assert answer.stop_reason == "tool_use"
    (call,) = answer.content
    assert call.input["city"] in ("Paris", "Rome")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    history = [
        *CHAT,
        {"role": "assistant", "content": [call.model_dump(exclude_none=True)]},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
        {"role": "assistant", "content": "It is"},
    ]
    after = claude.messages.create(model="tiny", max_tokens=3, messages=history)
    assert after.role == "assistant"
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(model="tiny", max_tokens=0, messages=CHAT)
    assert caught.value.body["error"]["param"] == "max_tokens"


def test_text_becomes_token_ids_and_text_again(serving):
    status, answer, _ = serving.ask("/tokenize", {"prompt": "One token", "with_pieces": True})
    assert status == 200
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    status, back, _ = serving.ask("/detokenize", {"tokens": answer["tokens"]})
    assert (status, back) == (200, {"prompt": "One token"})
    status, chat, _ = serving.ask("/tokenize", {"messages": CHAT})
    assert (status, chat["count"] > 3) == (200, True)
    assert serving.ask("/detokenize", {"tokens": [10**6]})[1]["error"]["param"] == "tokens"


FEATURES = {
    "stream": {"stream": True},
    "n": {"n": 2},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "stop": {"stop": ["e", "zz"]},
    "form": {"response_format": {"type": "regex", "pattern": "[a-f]{2,40}"}},
    "calls": {"tools": [TOOL], "tool_choice": "required"},
    "penalties": {"presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.3},
    "bias": {"logit_bias": {"70": 50, "71": -100}},
    "greedy": {"temperature": 0},
    "filters": {"top_p": 0.5, "top_k": 9, "min_p": 0.1, "temperature": 1.5, "seed": 9},
    "one": {"max_tokens": 1},
    "ignore_eos": {"ignore_eos": True},
    "min_tokens": {"min_tokens": 5, "max_tokens": 7},
    "continued": {"continue_final_message": True},
}


def test_every_pair_of_features_gives_a_whole_answer(serving):
    base = {"messages": [*CHAT, {"role": "assistant", "content": "I"}], "max_tokens": 12}
    for first, second in combinations(FEATURES, 2):
        pair = {first, second}
        if pair == {"one", "min_tokens"}:
            continue  # they contradict each other
        body = {**base, **FEATURES[first], **FEATURES[second]}
        if "stream" in pair:
            *chunks, done = serving.stream(body, "/v1/chat/completions")
            assert done == "[DONE]", pair
            chunks = [json.loads(chunk) for chunk in chunks]
            ends = [c["choices"][0]["finish_reason"] for c in chunks if "choices" in c]
            assert len([end for end in ends if end]) == body.get("n", 1), (pair, chunks[-1])
            continue
        status, answer, _ = serving.ask("/v1/chat/completions", body)
        assert status == 200, (pair, answer)
        for choice in answer["choices"]:
            assert choice["finish_reason"] in ("stop", "length", "tool_calls"), pair
            text = choice["message"]["content"] or ""
            if "form" in pair and not pair & {"calls", "continued"}:
                assert set(text) <= set("abcdef"), (pair, text)
            if "logprobs" in pair:
                assert choice["logprobs"]["content"], pair
