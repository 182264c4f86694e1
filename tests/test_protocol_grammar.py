"""Grammars: what they allow, what is refused, and that no grammar can harm the process."""

import json
import subprocess
import sys

import numpy as np
import pytest

from checkpoints import write_tokenizer
from flashformer.engine.tokenizer import Tokenizer
from flashformer.errors import ParameterError
from flashformer.serve.protocol.formats import AnswerFormat
from flashformer.serve.protocol.grammar import CACHE_BYTES, MAX_SOURCE_BYTES, GrammarCompiler
from flashformer.serve.protocol.rules import AnswerRules
from flashformer.serve.protocol.shapes import choice, json_schema, regex
from flashformer.serve.protocol.tools import Tool, ToolUse
from flashformer.serve.server.messages import Grammar

VOCAB = 330  # larger than the tokenizer's, as padded models have it
EOS = 1
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOLS = [Tool("f", None, SCHEMA, "tools[0]"), Tool("g", None, {"type": "object"}, "tools[1]")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, VOCAB, [EOS])


def follows(compiler, tokenizer, grammar, text):
    """Whether `text` is a whole answer that the grammar allows."""
    constraint = compiler.compile(grammar).constraint()
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        if constraint.complete or not constraint.allowed()[token_id]:
            return False
        constraint.accept(token_id)
    return constraint.complete or bool(constraint.allowed()[EOS])


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (json_schema("x", SCHEMA), '{"a": 12}', '{"a": "12"}'),
        (Grammar("json_object"), '{"b": [null, 1.5]}', "[1]"),
        (regex("x", "a/b+[0-9]"), "a/bb7", "a/7"),
        (choice("x", ["yes", 'n"o']), 'n"o', "no"),
        (Grammar("lark", 'start: "a" b\nb: /x+/'), "axx", "ab"),
    ],
)
def test_a_grammar_allows_its_texts_and_no_others(compiler, tokenizer, grammar, good, bad):
    assert follows(compiler, tokenizer, grammar, good)
    assert not follows(compiler, tokenizer, grammar, bad)


def rules_for(tools, *, mode="required", shape=None, reasons=False, parallel=True):
    return AnswerRules(AnswerFormat(tools, reasons), ToolUse(TOOLS, mode, TOOLS, parallel), shape)


@pytest.mark.parametrize(
    ("form", "one", "two"),
    [
        (
            "hermes",
            '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
            '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\n'
            '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
        ),
        (
            "mistral",
            '[{"name": "f", "arguments": {"a": 1}}]',
            '[{"name": "g", "arguments": {}}, {"name": "f", "arguments": {"a": 1}}]',
        ),
        (
            None,
            '{"name": "f", "parameters": {"a": 1}}',
            '{"name": "g", "parameters": {}}; {"name": "f", "parameters": {"a": 1}}',
        ),
    ],
)
def test_forced_calls_are_calls_and_are_read_as_calls(compiler, tokenizer, form, one, two):
    many, single = rules_for(form), rules_for(form, parallel=False)
    for text, rules, expected in ((one, single, 1), (one, many, 1), (two, many, 2)):
        assert follows(compiler, tokenizer, rules.grammar([], str), text)
        parser = rules.form.tool_parser(TOOLS, forced=True)
        pieces = parser.add(text) + parser.finish()
        assert {piece.index for piece in pieces} == set(range(expected))
    assert not follows(compiler, tokenizer, single.grammar([], str), two)
    assert not follows(compiler, tokenizer, many.grammar([], str), "Hello")


def test_a_grammar_begins_behind_the_reasoning(compiler, tokenizer):
    rules = AnswerRules(AnswerFormat(None, True), shape=json_schema("x", SCHEMA))
    answer = '{"a": 1}'
    for prompt, good, bad in (
        ("<think>\n", f"hm {{</think>\n\n{answer}", answer),
        ("<think>\n\n</think>\n\n", answer, f"<think>hm</think>{answer}"),
        ("hello", f"<think>\nhm\n</think>\n{answer}", f"hm</think>{answer}"),
        ("hello", answer, "hm"),
    ):
        grammar = rules.grammar([7], lambda _, prompt=prompt: prompt)
        assert follows(compiler, tokenizer, grammar, good), (prompt, good)
        assert not follows(compiler, tokenizer, grammar, bad), (prompt, bad)


def test_an_answer_may_be_a_call_or_have_its_form(compiler, tokenizer):
    rules = rules_for("hermes", mode="auto", shape=json_schema("x", SCHEMA))
    rules.check()
    grammar = rules.grammar([], str)
    assert follows(compiler, tokenizer, grammar, '{"a": 1}')
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert follows(compiler, tokenizer, grammar, call)
    assert not follows(compiler, tokenizer, grammar, "Hello")


def test_two_sequences_of_a_grammar_do_not_see_each_other(compiler, tokenizer):
    compiled = compiler.compile(regex("x", "ab|cd"))
    first, second = compiled.constraint(), compiled.constraint()
    before = second.allowed()
    first.accept(tokenizer.encode("a")[0])
    assert np.array_equal(second.allowed(), before)
    assert before.shape == (VOCAB,)


def test_a_model_without_an_end_token_ends_where_nothing_may_follow(tokenizer):
    constraint = GrammarCompiler(tokenizer, VOCAB, []).compile(regex("x", "ab?")).constraint()
    constraint.accept(tokenizer.encode("a")[0])
    assert set(np.flatnonzero(constraint.allowed())) == set(tokenizer.encode("b"))
    constraint.accept(tokenizer.encode("b")[0])
    assert constraint.complete


REFUSED = [
    json_schema("where", {"type": "nonsense"}),
    json_schema("where", {"$ref": "#/nowhere"}),
    json_schema("where", {"$ref": "http://127.0.0.1:9/x.json"}),
    json_schema("where", {"not": {}}),
    json_schema("where", {"type": "integer", "minimum": 5, "maximum": 1}),
    json_schema("where", {"type": "string", "pattern": "("}),
    Grammar("regex", "(", "where"),
    Grammar("lark", "start: missing", "where"),
    Grammar("lark", "", "where"),
    Grammar("regex", "a" * (MAX_SOURCE_BYTES + 1), "where"),
]


@pytest.mark.parametrize("grammar", REFUSED)
def test_a_grammar_that_cannot_be_used_is_refused_with_its_field(compiler, grammar):
    with pytest.raises(ParameterError) as caught:
        compiler.compile(grammar)
    assert caught.value.parameter == "where"
    assert len(str(caught.value)) < 500


def test_the_cache_holds_no_more_than_it_may(tokenizer):
    compiler = GrammarCompiler(tokenizer, VOCAB, [EOS], cache_bytes=1 << 20)
    kept = [compiler.compile(regex("x", f"a{{{n}}}")) for n in range(1, 12)]
    assert compiler.held_bytes <= 1 << 20
    assert compiler.compile(regex("x", "a{11}")) is kept[-1]
    assert compiler.compile(regex("x", "a{1}")) is not kept[0]
    assert CACHE_BYTES == 128 << 20


def test_a_grammar_that_takes_too_long_is_refused(tokenizer):
    compiler = GrammarCompiler(tokenizer, VOCAB, [EOS], max_seconds=0.0)
    schema = {"enum": [f"value {n}" for n in range(8000)]}
    with pytest.raises(ParameterError, match="seconds"):
        compiler.compile(json_schema("x", schema))


# Grammars that recurse as deep as the largest source allows, or explode. In a process of their own:
# the first two overflow an ordinary stack.
HOSTILE = """
import json, sys, time
from pathlib import Path
from flashformer.engine.tokenizer import Tokenizer
from flashformer.errors import ParameterError
from flashformer.serve.protocol.grammar import GrammarCompiler
from flashformer.serve.server.messages import Grammar
compiler = GrammarCompiler(Tokenizer.from_folder(Path(sys.argv[1])), 330, [1])
refs = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5500)} | {"d5500": {"type": "string"}}
rules = "".join(f"r{i}: r{i + 1}\\n" for i in range(15000))
grammars = [
    Grammar("json_schema", json.dumps({"$defs": refs, "$ref": "#/$defs/d0"})),
    Grammar("lark", "start: r0\\n" + rules + 'r15000: "a"'),
    Grammar("json_schema", '{"$ref": "#"}'),
    Grammar("regex", "(" * 50000 + "a" + ")" * 50000),
    Grammar("regex", "((a{1000}){1000}){1000}"),
    Grammar("regex", "(\\\\w|\\\\d|\\\\s)*" * 1000),
    Grammar("lark", "start: " + "(" * 50000 + '"a"' + ")" * 50000),
    Grammar("lark", "start: start start | start start start"),
    Grammar("json_schema", json.dumps({"enum": [f"v{i}" for i in range(20000)]})),
    Grammar("json_schema", json.dumps({"allOf": [{"oneOf": [{"properties": {f"a{i}": {"const": 1}}},
        {"properties": {f"b{i}": {"const": 1}}}]} for i in range(200)]})),
]
for grammar in grammars:
    assert len(grammar.source) <= 256 << 10, len(grammar.source)
    start = time.monotonic()
    try:
        constraint = compiler.compile(grammar).constraint()
        for _ in range(20):
            allowed = [i for i in constraint.allowed().nonzero()[0] if i != 1]
            if not allowed:
                break
            constraint.accept(int(allowed[len(allowed) // 2]))
    except (ParameterError, ValueError):
        pass
    print(round(time.monotonic() - start, 2), grammar.kind, len(grammar.source))
print("alive")
"""


def test_no_grammar_can_end_the_process(tmp_path):
    write_tokenizer(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.stdout.splitlines()[-1:] == ["alive"], (
        run.returncode,
        run.stdout,
        run.stderr[-500:],
    )


def test_schemas_may_be_any_json_that_says_so(compiler, tokenizer):
    source = json.dumps({"type": "array", "items": {"enum": ["é", 1]}, "maxItems": 2})
    assert follows(compiler, tokenizer, Grammar("json_schema", source), '["é", 1]')
