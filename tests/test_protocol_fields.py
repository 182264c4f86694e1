"""One validator for every entrance: each field of each route against values that it cannot take."""

import json
import math
from dataclasses import replace

import pytest

from flashformer.engine.sampling import SamplingParams
from flashformer.errors import ParameterError
from flashformer.serve.protocol import chat, completions, messages, responses, tokens
from flashformer.serve.protocol.body import MAX_DEPTH, read_body
from flashformer.serve.protocol.fields import markdown
from flashformer.serve.server.endpoint import RequestError
from flashformer.serve.server.messages import ModelInfo

INFO = ModelInfo(
    model_id="m",
    created=0,
    context=512,
    vocab_size=321,
    max_batch=8,
    device="reference",
    machine="any",
    format="bf16",
    image_bytes=0,
    kv_bytes=0,
    kv_bytes_per_token=0,
    num_pages=8,
    page_tokens=16,
    fingerprint="f",
    eos_token_ids=(1,),
    has_chat_template=True,
    chat_template="{{ messages }} {{ tools }} <tool_call>",
)
CHAT = [{"role": "user", "content": "hi"}]
# route -> (fields, parser, the smallest body)
ROUTES = {
    "chat": (chat.FIELDS, chat.parse_chat, {"messages": CHAT}),
    "completions": (completions.FIELDS, completions.parse_completion, {"prompt": "hi"}),
    "responses": (responses.FIELDS, responses.parse_response, {"input": "hi"}),
    "messages": (
        messages.FIELDS,
        messages.parse_message,
        {"messages": CHAT, "max_tokens": 8},
    ),
    "count_tokens": (messages.COUNT_FIELDS, messages.parse_count, {"messages": CHAT}),
    "tokenize": (tokens.TOKENIZE_FIELDS, tokens.parse_tokenize, {"prompt": "hi"}),
    "detokenize": (tokens.DETOKENIZE_FIELDS, tokens.parse_detokenize, {"tokens": [5]}),
}
NAMED = [
    (route, name)
    for route, (fields, _, _) in ROUTES.items()
    for field in fields
    for name in (field.name, *field.aliases)
]
# Spellings of values in JSON text: some of them have no value in Python's own writer.
NEVER = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "-1e400",
    '"\\ud800"',
    '["\\udfff x"]',
    "9" * 5000,
]
HOSTILE = [
    "-1", "0", "-0.5", "1.5", "3.0", "1e30", "2147483648", "18446744073709551616", "9" * 40,
    "true", "false", '""', '"\\u0000"', '"text"', "[]", "{}", "[[]]", "[null]", "[{}]", '[""]',
    '{"a": 1}', '{"type": "x"}', '{"type": []}', "[1.5]", "[-1]", "[true]", '{"17": "x"}',
    '{"-1": 1}', '{"400": 1}', json.dumps("x" * 2**20), json.dumps(["x" * 300] * 20),
    json.dumps([1] * 2000), json.dumps({str(i): 1 for i in range(1100)}),
]  # fmt: skip


def outcome(parse, body):
    """The field that a body is refused for; None if it is taken. Anything else is a bug."""
    error = refusal(parse, body)
    if error is None:
        return None
    assert 400 <= error.status < 500
    assert error.message.endswith(".")
    assert len(error.message) < 600
    assert error.message.encode()
    return error.param or "?"


def refusal(parse, body):
    try:
        parse(body, INFO)
    except RequestError as error:
        return error
    return None


def body_with(route, name, text):
    rest = {k: v for k, v in ROUTES[route][2].items() if k != name}
    if name in ("content", "prompt", "messages"):
        rest.pop("prompt", None)
    head = json.dumps(rest)[:-1]
    return f"{head}{', ' if rest else ''}{json.dumps(name)}: {text}}}".encode()


def concerns(param, name):
    """Whether a refusal names the field or something inside it."""
    return param == name or param.startswith((f"{name}.", f"{name}["))


@pytest.mark.parametrize(("route", "name"), NAMED)
def test_values_that_json_should_not_hold_are_refused_with_the_field(route, name):
    for text in NEVER:
        param = outcome(ROUTES[route][1], body_with(route, name, text))
        assert param is not None, text
        assert concerns(param, name), (text, param)


# Fields whose refusal may name the partner that a value needs or excludes.
PARTNERS = {
    "top_logprobs": ("logprobs",),
    "logprobs": ("prompt_logprobs",),
    "min_tokens": ("max_tokens",),
    "max_tokens": ("min_tokens",),
    "tool_choice": ("tools",),
    "tools": ("tool_choice",),
    "add_generation_prompt": ("continue_final_message",),
    "continue_final_message": ("add_generation_prompt",),
    "content": ("prompt",),
    "messages": ("prompt",),
}


@pytest.mark.parametrize(("route", "name"), NAMED)
def test_a_hostile_value_is_taken_or_refused_with_its_field(route, name):
    refusals = 0
    for text in HOSTILE:
        param = outcome(ROUTES[route][1], body_with(route, name, text))
        if param is not None:
            refusals += 1
            names = (name, *PARTNERS.get(name, ()))
            assert any(concerns(param, known) for known in names), (text[:50], param)
    assert refusals >= 5


@pytest.mark.parametrize(("route", "name"), NAMED)
def test_null_means_the_same_as_a_missing_field(route, name):
    fields, parse, body = ROUTES[route]
    field = next(f for f in fields if name in (f.name, *f.aliases))
    param = outcome(parse, json.dumps({**body, name: None}).encode())
    needed = field.required or (route == "tokenize" and name == "prompt")
    assert param == (name if needed else None)


@pytest.mark.parametrize("route", ROUTES)
def test_unknown_fields_are_ignored(route):
    _, parse, body = ROUTES[route]
    extra = {"a_field_of_next_year": {"x": [1, "y", None]}, "user": "u", "store": True}
    assert outcome(parse, json.dumps({**body, **extra}).encode()) is None


@pytest.mark.parametrize("route", ROUTES)
def test_another_model_is_not_found(route):
    _, parse, body = ROUTES[route]
    with pytest.raises(RequestError) as caught:
        parse(json.dumps({**body, "model": "other"}).encode(), INFO)
    assert (caught.value.status, caught.value.param) == (404, "model")


BROKEN = [b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b'{"a": \xff}', b'{"a" 1}', b"{} x"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("body", [*BROKEN, b"[" * 10**6, b'{"a":' * 10**5])
def test_a_body_that_is_no_object_is_refused(route, body):
    assert outcome(ROUTES[route][1], body) is not None


def test_an_integer_longer_than_any_field_takes_is_refused_by_its_field():
    assert read_body(b'{"a": 1, "b": %s}' % (b"7" * 64))["b"] == int("7" * 64)
    with pytest.raises(RequestError) as caught:
        read_body(b'{"a": 1, "b": [-%s]}' % (b"1234567890" * 7))
    assert caught.value.param == "b"


def test_a_body_is_refused_where_it_becomes_too_deep():
    def nested(depth):
        return json.dumps({"messages": json.loads("[" * depth + "]" * depth)}).encode()

    assert read_body(nested(MAX_DEPTH - 1))
    with pytest.raises(RequestError, match=r"messages.*nested"):
        read_body(nested(MAX_DEPTH))


SAMPLING_VALUES = [
    -1, 0, 1, 2.5, 1e30, 2**63, 2**64, True, False, "", "x", "1", [], {}, [1], ["a"], [-1],
    {"5": 1}, {"400": 1}, {"x": 1}, {"5": "1"}, {"5": 101}, ["a"] * 17, ["x" * 257], [1] * 129,
]  # fmt: skip
PARAMETERS = [
    (field.name, field.parameter)
    for field in chat.FIELDS
    if field.parameter not in (None, "prompt_logprobs")
]


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS)
def test_http_and_the_python_api_refuse_the_same_values(name, parameter):
    from flashformer.engine.sampling import check_vocabulary

    for value in SAMPLING_VALUES:
        try:
            check_vocabulary(SamplingParams(**{parameter: value}), INFO.vocab_size, (1,))
            expected = None
        except ParameterError as error:
            expected = error.parameter
        body = json.dumps({"messages": CHAT, name: value}).encode()
        assert outcome(ROUTES["chat"][1], body) == expected, value


def test_an_alias_must_not_contradict_its_field():
    body = {"messages": CHAT, "max_tokens": 3, "max_completion_tokens": 4}
    assert outcome(ROUTES["chat"][1], json.dumps(body).encode()) == "max_completion_tokens"
    body["max_completion_tokens"] = 3
    assert ROUTES["chat"][1](json.dumps(body).encode(), INFO).params.max_tokens == 3


def test_a_request_is_filled_with_the_model_s_defaults():
    info = replace(INFO, default_params={"temperature": 0.5, "top_k": 7})
    params = ROUTES["chat"][1](json.dumps({"messages": CHAT, "top_k": 3}).encode(), info).params
    assert (params.temperature, params.top_k) == (0.5, 3)


@pytest.mark.parametrize("route", ROUTES)
def test_a_deterministic_storm_of_mutated_bodies_ends_in_answers(route):
    import random

    draw = random.Random(route)
    fields, parse, body = ROUTES[route]
    names = [field.name for field in fields]
    values = [json.loads(text) for text in HOSTILE if len(text) < 1000] + [None, CHAT, math.pi]
    for _ in range(400):
        mutated = {**body, **{draw.choice(names): draw.choice(values) for _ in range(3)}}
        outcome(parse, json.dumps(mutated).encode())


@pytest.mark.parametrize("route", ROUTES)
def test_the_documentation_shows_the_table_of_every_route(route):
    from pathlib import Path

    text = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
    assert markdown(ROUTES[route][0]) in text
