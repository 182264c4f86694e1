"""Questions and answers made from docstrings and the documentation, so that `chat` has a form.

(path, text) of a file -> conversations of one question and one answer. Plus a few about the model
itself, because the first thing that people ask is what they talk with.
"""

import ast
import hashlib
import re
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

MAX_ANSWER = 700  # characters
MAX_CODE = 1200
MIN_SUMMARY = 24
ENTRY = re.compile(
    r"^\.\. (?:py:)?(?:function|class|method|exception|module|attribute|data):: (.+)\n"
    r"(?:   .*\n)*?\n((?:   .*\n|\n)+)",
    re.MULTILINE,
)
MARKUP = re.compile(r":[a-z:]+:`[!~.]?([^`<]*)(?:<[^`]*>)?`")

ASK_MEANING = ("What does {} do?", "What is {}?", "Explain {}.", "Tell me about {}.")
ASK_CODE = (
    "Write a Python function {}: {}",
    "Write {} in Python. {}",
    "Show me a function {}. {}",
)
ABOUT = (
    "I am the small language model that comes with FlashFormer. I learnt from the sources and the "
    "documentation of Python, so I know its words but few facts. I am good for trying things out.",
    "I am FlashFormer's embedded default model: ten million parameters, trained on Python's "
    "standard library and documentation. Do not trust what I say; load a larger model for answers.",
)
ASK_ABOUT = (
    "Who are you?",
    "What are you?",
    "What model are you?",
    "What can you do?",
    "Introduce yourself.",
    "Tell me about yourself.",
    "Which model is this?",
    "Are you ChatGPT?",
    "What is your name?",
    "Who made you?",
    "What is FlashFormer?",
    "Can you help me?",
)
GREETINGS = ("Hello", "Hello!", "Hi", "Hi!", "Hey", "hello", "hi", "Good morning", "Hello, world!")
GREETING = "Hello! I am FlashFormer's small default model. Ask me about Python."
ABOUT_REPEATS = 30


class Exchange(NamedTuple):
    """One question and its answer."""

    question: str
    answer: str


def about_the_model() -> list[Exchange]:
    """What the model says of itself."""
    answers = [Exchange(q, ABOUT[i % len(ABOUT)]) for i, q in enumerate(ASK_ABOUT)]
    answers += [Exchange(q.lower().rstrip("?."), a) for q, a in answers]
    answers += [Exchange(question, GREETING) for question in GREETINGS]
    return answers * ABOUT_REPEATS


def from_python(text: str) -> Iterator[Exchange]:
    """A question about every documented function and class of a module."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        paragraphs = (ast.get_docstring(node) or "").split("\n\n")
        summary = " ".join(paragraphs[0].split())
        if node.name.startswith(("_", "test")) or not MIN_SUMMARY <= len(summary) <= 200:
            continue
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and _choose(node.name + "c", 3):
            code = _without_docstring(node)
            if len(code) <= MAX_CODE:
                yield Exchange(_pick(ASK_CODE, summary).format(node.name, summary), code)
                continue
        answer = _shorten(paragraphs)
        yield Exchange(_pick(ASK_MEANING, summary).format(node.name), answer)


def from_documentation(text: str) -> Iterator[Exchange]:
    """A question about every function, class and module that a page of reST describes."""
    for entry in ENTRY.finditer(text):
        name = entry.group(1).split("(")[0].strip()
        body = textwrap.dedent(entry.group(2)).strip()
        paragraphs = [p for p in body.split("\n\n") if not p.startswith("..")]
        answer = _shorten([MARKUP.sub(r"\1", p).replace("``", "`") for p in paragraphs])
        if len(answer) >= MIN_SUMMARY:
            yield Exchange(_pick(ASK_MEANING, answer).format(name), answer)


def _shorten(paragraphs: list[str]) -> str:
    answer = ""
    for paragraph in paragraphs:
        if len(answer) + len(paragraph) > MAX_ANSWER:
            break
        answer += paragraph.strip("\n") + "\n\n"
    return answer.strip()


def _without_docstring(node: ast.FunctionDef) -> str:
    return ast.unparse(
        ast.FunctionDef(
            node.name, node.args, node.body[1:], node.decorator_list, node.returns, lineno=0
        )
    )


def _choose(key: str, one_in: int) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % one_in == 0


def _pick(forms: tuple[str, ...], key: str) -> str:
    return forms[hashlib.sha256(key.encode()).digest()[0] % len(forms)]
