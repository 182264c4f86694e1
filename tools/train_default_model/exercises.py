"""The textbook as documents: every exercise in the forms and with the names that people use.

textbook/*.py, the exercises of every first course -> texts to learn from, and questions for them.
"""

import ast
import re
from itertools import pairwise
from pathlib import Path

from conversations import Exchange

TEXTBOOK = Path(__file__).parent / "textbook"
RENAMED = {  # a parameter -> what others call it
    "n": ("num", "number"),
    "items": ("arr", "nums", "numbers", "lst", "array"),
    "values": ("numbers", "data", "nums"),
    "text": ("s", "string"),
    "path": ("filename", "file_path"),
    "target": ("x", "key"),
    "function": ("func",),
}

Node = ast.FunctionDef | ast.ClassDef


def exercises() -> list[str]:
    """Every exercise in all its forms, each alone in a document, some followed by another."""
    documents = []
    sources = _sources()
    for source, following in pairwise([*sources, sources[0]]):
        forms = _forms(source)
        documents += [*forms, f"{forms[-1]}\n\n{_forms(following)[-1]}"]
    return documents


def exercise_questions() -> list[Exchange]:
    """Requests for every exercise, answered with its code."""
    questions = []
    for source in _sources():
        node = _node(source)
        what = (ast.get_docstring(node) or "").rstrip(".")
        words = node.name.replace("_", " ")
        code = _written(source, annotated=False, explained=False).strip()
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        questions += [
            Exchange(f"Write a Python {kind} {node.name}: {what}.", code),
            Exchange(f"Write a {words} {kind}.", code),
            Exchange(f"Write {words} in Python.", code),
        ]
    return questions


def _sources() -> list[str]:
    """The source of every exercise."""
    sources = []
    for file in sorted(TEXTBOOK.glob("*.py")):
        text = file.read_text()
        nodes = ast.parse(text).body
        lines = text.split("\n")
        exercises = (node for node in nodes if isinstance(node, Node))
        sources += ["\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in exercises]
    return sources


def _node(source: str) -> Node:
    node = ast.parse(source).body[0]
    assert isinstance(node, Node)
    return node


def _forms(source: str) -> list[str]:
    """With and without annotations and docstring; then with every other name of a parameter."""
    forms = [_written(source, annotated, explained) for annotated, explained in BOTH]
    for old, new in _renamings(source):
        renamed = re.sub(rf"\b{old}\b", new, source)
        forms += [_written(renamed, annotated=False, explained=told) for told in (True, False)]
    return list(dict.fromkeys(forms))


BOTH = ((True, True), (True, False), (False, True), (False, False))


def _renamings(source: str) -> list[tuple[str, str]]:
    """(parameter, another name) that the exercise does not use for something else."""
    node = _node(source)
    parameters = [a.arg for a in node.args.args] if isinstance(node, ast.FunctionDef) else []
    return [
        (old, new)
        for old in parameters
        for new in RENAMED.get(old, ())
        if not re.search(rf"\b{new}\b", source)
    ]


def _written(source: str, annotated: bool, explained: bool) -> str:
    """One form of an exercise, with a line end."""
    head, docstring, *body = source.split("\n")
    node = _node(source)
    if isinstance(node, ast.FunctionDef) and not annotated:
        head = f"def {node.name}({', '.join(argument.arg for argument in node.args.args)}):"
    if explained:
        body = [docstring, *body]
    elif body[0] == "":
        body = body[1:]
    return "\n".join([head, *body]) + "\n"
