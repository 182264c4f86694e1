"""Chat templates: the same text as transformers for the shapes of template that models ship."""

import json

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models

from flashformer.engine.chat import ChatTemplates
from flashformer.errors import CheckpointError, FlashFormerError, UsageError

CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if tools %}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA3 = """\
{% set loop_messages = messages %}{% for message in loop_messages %}
    {% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' \
+ message['content'] | trim + '<|eot_id|>' %}
    {% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
    {{ content }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""
MISTRAL = """\
{{ bos_token }}{% set ns = namespace(turn=0, system='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.system = message.content ~ '\n\n' %}
        {%- continue %}
    {%- endif %}
    {%- if (message.role == 'user') != (ns.turn % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- set ns.turn = ns.turn + 1 %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (ns.system if loop.last else '') + message.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}"""
TOOLS = """\
{%- macro show(value) %}{{ value | tojson(indent=2) }}{% endmacro %}
{%- for tool in tools or [] %}{{ show(tool.function) }};{% endfor %}
{%- for message in messages %}
{%- if message.content is string %}{{ message.role }}: {{ message.content }}
{%- else %}{{ message.role }}: {% for part in message.content %}{{ part.text }}{% endfor %}
{%- endif %}
{%- for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}
{%- endfor %}{% generation %}{{ dict(a=1, b='<&>') | tojson }}{% endgeneration %}
{%- for n in range(3) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}"""
DATED = "{{ strftime_now('%Y') }} {{ messages[0].content }}"

CONVERSATIONS = {
    "one": [{"role": "user", "content": "Hi <b>&</b> \"you\" 'there' 世界"}],
    "turns": [
        {"role": "user", "content": "  spaces kept?  "},
        {"role": "assistant", "content": "yes\n"},
        {"role": "user", "content": "bye"},
    ],
    "system": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
    "none": [{"role": "user", "content": "x", "tool_calls": None, "name": None}],
}
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"z": 1, "a": ["é", None, True, 1.5]}},
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def ours(template):
    return ChatTemplates({"default": template}, SPECIAL)


def theirs(template):
    from transformers import PreTrainedTokenizerFast

    library = Library(models.BPE({"<s>": 0, "</s>": 1}, []))
    return PreTrainedTokenizerFast(
        tokenizer_object=library, chat_template=template, bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("conversation", sorted(CONVERSATIONS))
@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, TOOLS, DATED])
def test_the_text_equals_that_of_transformers(template, conversation, generate):
    messages = CONVERSATIONS[conversation]
    for tools in (None, [TOOL]):
        expected = theirs(template).apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=generate
        )
        text = ours(template).render(messages, tools=tools, add_generation_prompt=generate)
        assert text == expected


@pytest.mark.parametrize("content", ["Sure, ", "Sure", "  a\n b  "])
@pytest.mark.parametrize("template", [CHATML, LLAMA3, TOOLS])
def test_a_continued_message_is_left_open_as_in_transformers(template, content):
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": content}]
    expected = theirs(template).apply_chat_template(
        messages, tokenize=False, continue_final_message=True
    )
    text = ours(template).render(messages, continue_final_message=True, add_generation_prompt=False)
    assert text == expected


def test_a_continued_message_of_parts_ends_with_its_last_text():
    messages = [{"role": "user", "content": [{"type": "text", "text": "one "}, {"text": "two"}]}]
    text = ours(TOOLS).render(messages, continue_final_message=True, add_generation_prompt=False)
    assert text == "user: one two"


def test_template_variables_reach_the_template():
    text = ours(CHATML).render(CONVERSATIONS["one"], template_kwargs={"enable_thinking": False})
    assert text.endswith("<think>\n\n</think>\n\n")


def test_rendering_leaves_the_caller_s_messages_as_they_are():
    messages = [{"role": "user", "content": "x", "name": None}]
    ours(CHATML).render(messages, continue_final_message=True, add_generation_prompt=False)
    assert messages == [{"role": "user", "content": "x", "name": None}]


def test_templates_are_found_in_all_three_places(tmp_path):
    config = {"chat_template": "from config"}
    assert ChatTemplates.from_folder(tmp_path, config, {}).templates == {"default": "from config"}
    (tmp_path / "chat_template.jinja").write_text("from file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("extra")
    found = ChatTemplates.from_folder(tmp_path, config, {}).templates
    assert found == {"default": "from file", "rag": "extra"}
    listed = {"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use"}]}
    assert ChatTemplates.from_folder(tmp_path / "none", listed, {}).templates == {"default": "a"}


def test_the_tool_template_is_chosen_when_there_are_tools():
    templates = ChatTemplates({"default": "plain", "tool_use": "tools"}, {})
    messages = CONVERSATIONS["one"]
    assert templates.render(messages) == "plain"
    assert templates.render(messages, tools=[TOOL]) == "tools"
    assert templates.render(messages, chat_template="tool_use") == "tools"
    assert templates.render(messages, chat_template="{{ 1 + 1 }}") == "2"


@pytest.mark.parametrize(
    ("templates", "sentence"),
    [({}, "has no chat template"), ({"rag": "x"}, "no default chat template, only rag")],
)
def test_a_checkpoint_without_template_says_so(templates, sentence):
    with pytest.raises(UsageError, match=sentence):
        ChatTemplates(templates, {}).render(CONVERSATIONS["one"])


def test_a_template_s_refusal_becomes_the_error():
    messages = [{"role": "assistant", "content": "x"}]
    with pytest.raises(UsageError, match="refused the messages: roles must alternate"):
        ours(MISTRAL).render(messages)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        {"role": "user"},
        [{"content": "no role"}],
        ["text"],
        [{"role": 5, "content": "x"}],
        [{"role": "user", "content": object()}],
        [{"role": "user", "content": print}],
        None,
    ],
)
def test_messages_of_another_shape_are_refused(messages):
    with pytest.raises(UsageError) as caught:
        ours(CHATML).render(messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "a b", ""])
def test_template_variables_cannot_replace_the_conversation(name):
    with pytest.raises(UsageError, match="chat_template_kwargs"):
        ours(CHATML).render(CONVERSATIONS["one"], template_kwargs={name: 1})


def test_continuing_and_starting_a_message_exclude_each_other():
    with pytest.raises(UsageError, match="switch one of them off"):
        ours(CHATML).render(CONVERSATIONS["one"], continue_final_message=True)


def test_a_message_that_the_template_leaves_out_cannot_be_continued():
    with pytest.raises(UsageError, match="leaves the last message's text out"):
        ours("fixed").render(
            CONVERSATIONS["one"], continue_final_message=True, add_generation_prompt=False
        )


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['__builtins__'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__init__ }}{{ dict.mro() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ messages|attr('__class__')|attr('__base__') }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{% set ns = namespace(__x=1) %}",
    "{{ '{0.__class__}'.format(1) }}{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% include 'x' %}",
    "{% for i in range(99999) %}{{ 'A' * 99999 }}{% endfor %}",
    "{{ 1 / 0 }}",
    "{{ undefined_name.attribute }}",
    "{{ messages | no_such_filter }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% broken",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
]


@pytest.mark.parametrize("template", ATTACKS)
def test_an_attack_ends_in_one_sentence_or_in_harmless_text(template):
    messages = [{"role": "user", "content": "x"}]
    outcome = outcome_of(template, messages)
    assert "\n" not in outcome
    assert len(outcome) < 700
    assert "class" not in outcome.replace("'__class__'", "")
    assert "<function" not in outcome
    assert messages == [{"role": "user", "content": "x"}]


def outcome_of(template, messages):
    try:
        return ours(template).render(messages)
    except FlashFormerError as error:
        return str(error)


def test_a_template_that_is_not_jinja_is_the_checkpoint_s_fault():
    with pytest.raises(CheckpointError, match="line 2"):
        ours("fine\n{% if %}").render(CONVERSATIONS["one"])


def test_tojson_writes_json_that_parses_back():
    value = {"é": ["<", ">", "&", "'", '"', None]}
    text = ours("{{ value | tojson }}").render(
        CONVERSATIONS["one"], template_kwargs={"value": value}
    )
    assert json.loads(text) == value
    assert "é" in text
    assert "<" in text
