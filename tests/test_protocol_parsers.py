"""Tool calls and reasoning in a stream: what is found does not depend on where it is cut."""

import random
from itertools import pairwise

import pytest

from flashformer.serve.protocol.pieces import CallArguments, CallBegin, Content, Reasoning
from flashformer.serve.protocol.reasoning import ReasoningParser
from flashformer.serve.protocol.tool_parsers import HermesParser, LlamaParser, MistralParser

PARSERS = {
    "hermes": HermesParser,
    "llama": lambda: LlamaParser(["f", "g"]),
    "mistral": MistralParser,
    "mistral-inside": lambda: MistralParser(inside=True),
    "think": lambda: ReasoningParser(inside=False),
    "think-inside": lambda: ReasoningParser(inside=True),
}


def call(index, name, arguments):
    return [CallBegin(index, name), CallArguments(index, arguments)]


F = call(0, "f", '{"a": 1}')
G = call(1, "g", "{}")
CASES = [
    (
        "hermes",
        'Hi \n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n',
        [Content("Hi"), *F],
    ),
    (
        "hermes",
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>'
        '<tool_call>\n{"name":"g","arguments":{}}</tool_call> bye <tool',
        [*F, *G, Content("bye <tool")],
    ),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>\\"}{"}}</tool_call>',
        call(0, "f", '{"a": "</tool_call>\\"}{"}'),
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', F),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', call(0, "f", "{}")),
    ("hermes", '<tool_call>{"name": "f"}', call(0, "f", "{}")),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', call(0, "f", '{"a": 1')),
    ("hermes", '<tool_call>{"na', [Content('<tool_call>{"na')]),
    ("hermes", "<tool_call>nope</tool_call> x", [Content("<tool_call>nope</tool_call> x")]),
    ("hermes", "a < b </tool_call> \n", [Content("a < b </tool_call> \n")]),
    ("hermes", "ü 漢字 🙂 <tool_cal", [Content("ü 漢字 🙂 <tool_cal")]),
    (
        "llama",
        ' {"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}} tail',
        [*F, *G, Content("tail")],
    ),
    ("llama", '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}', F),
    ("llama", '{"a": [1, {"name": "f"}]} rest', [Content('{"a": [1, {"name": "f"}]} rest')]),
    (
        "llama",
        '{"name": "unknown", "parameters": {}}',
        [Content('{"name": "unknown", "parameters": {}}')],
    ),
    ("llama", '{"name": "f"}', [Content('{"name": "f"}')]),
    (
        "llama",
        'Sure: {"name": "f", "parameters": {}}',
        [Content('Sure: {"name": "f", "parameters": {}}')],
    ),
    ("llama", "<|python", [Content("<|python")]),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
        [*F, *G],
    ),
    ("mistral", 'x [TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[ARGS]{}', [Content("x"), *F, *G]),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]abc123xyz[ARGS]{"a": 1}', F),
    ("mistral", "[TOOL_CALLS] what?", [Content("[TOOL_CALLS]what?")]),
    ("mistral", "[TOOL_CALLS]", [Content("[TOOL_CALLS]")]),
    ("mistral", "[1, 2] [TOOL_", [Content("[1, 2] [TOOL_")]),
    ("mistral-inside", '[{"name": "f", "arguments": {"a": 1}}]', F),
    (
        "think",
        "\n<think>\nhm </thin\n</think>\n\nYes. </think>",
        [Reasoning("hm </thin"), Content("Yes. </think>")],
    ),
    ("think", "  plain <think>", [Content("  plain <think>")]),
    ("think", "<thi", [Content("<thi")]),
    ("think", "<think></think>", []),
    ("think-inside", "hm \n", [Reasoning("hm")]),
    ("think-inside", "\nhm\n</think>ok", [Reasoning("hm"), Content("ok")]),
]


def parsed(kind, text, cuts):
    parser = PARSERS[kind]()
    edges = [0, *cuts, len(text)]
    pieces = [p for a, b in pairwise(edges) for p in parser.add(text[a:b])]
    return joined(pieces + parser.finish())


def joined(pieces):
    """Neighbouring pieces of one kind as one."""
    result = []
    for piece in pieces:
        last = result[-1] if result else None
        if type(last) is type(piece) and not isinstance(piece, CallBegin):
            last = result.pop()
            text = last.text + piece.text
            piece = (
                CallArguments(piece.index, text)
                if isinstance(piece, CallArguments)
                else type(piece)(text)
            )
        result.append(piece)
    return result


@pytest.mark.parametrize(("kind", "text", "expected"), CASES)
def test_an_answer_is_read_alike_wherever_it_is_cut(kind, text, expected):
    assert parsed(kind, text, []) == expected
    assert parsed(kind, text, range(1, len(text))) == expected
    for place in range(len(text)):
        assert parsed(kind, text, [place]) == expected


@pytest.mark.parametrize("kind", PARSERS)
def test_random_answers_are_read_alike_wherever_they_are_cut(kind):
    draw = random.Random(kind)
    parts = [
        "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<think>", "</think>",
        '{"name": "f", "arguments": {"a": 1}}', '{"name": "g", "parameters": {', '"', "{", "}", "[",
        "]", ",", ":", ";", " ", "\n", "\\", "f", "[ARGS]", '"name"', '"arguments"', "null", "é",
    ]  # fmt: skip
    for _ in range(1500):
        text = "".join(draw.choices(parts, k=draw.randint(1, 12)))
        whole = parsed(kind, text, [])
        assert parsed(kind, text, range(1, len(text))) == whole, text
        cuts = sorted(draw.sample(range(len(text)), draw.randint(0, len(text) // 2)))
        assert parsed(kind, text, cuts) == whole, text


def test_arguments_are_told_while_they_are_written():
    parser = HermesParser()
    pieces = parser.add('<tool_call>{"name": "f", "arguments": {"city": "Par')
    assert joined(pieces) == call(0, "f", '{"city": "Par')
