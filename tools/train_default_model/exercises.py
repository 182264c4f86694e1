"""textbook.py as documents: every exercise with and without its docstring and its annotations."""

import ast
from itertools import pairwise
from pathlib import Path

from conversations import Exchange

TEXTBOOK = Path(__file__).parent / "textbook.py"
REPEATS = 12  # of each form: a share of one in a hundred of the corpus


def exercises() -> list[str]:
    """Every exercise in four forms, each alone in a document, some followed by another."""
    forms = [_forms(node) for node in _nodes()]
    documents = [form for several in forms for form in several]
    documents += [f"{a[-1]}\n\n{b[-1]}" for a, b in pairwise(forms)]
    return documents * REPEATS


def exercise_questions() -> list[Exchange]:
    """Requests for every exercise, answered with its code."""
    questions = []
    for node in _nodes():
        what = (ast.get_docstring(node) or "").rstrip(".")
        words = node.name.replace("_", " ")
        code = _forms(node)[-1].strip()
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        questions += [
            Exchange(f"Write a Python {kind} {node.name}: {what}.", code),
            Exchange(f"Write a {words} {kind}.", code),
            Exchange(f"Write {words} in Python.", code),
        ]
    return questions * REPEATS


def _nodes() -> list[ast.FunctionDef | ast.ClassDef]:
    tree = ast.parse(TEXTBOOK.read_text())
    return [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def _forms(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """With everything; without annotations; without the docstring; with neither."""
    lines = TEXTBOOK.read_text().split("\n")[node.lineno - 1 : node.end_lineno]
    arguments = node.args.args if isinstance(node, ast.FunctionDef) else []
    plain = f"def {node.name}({', '.join(argument.arg for argument in arguments)}):"
    heads = (lines[0], plain) if isinstance(node, ast.FunctionDef) else (lines[0], lines[0])
    bodies = (lines[1:], lines[3:] if lines[2] == "" else lines[2:])
    return ["\n".join([head, *body]) + "\n" for body in bodies for head in heads]
