"""Questions about Python and their answers, made from the running interpreter's library and documentation.

A small set of conversations on every machine, for trying tuning out: no download, the same rows for the same
interpreter. Code is read, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

from moetrain.data.sources.stdlib import StdlibSource, topics
from moetrain.writing import write_atomic

_LONGEST, _SHORTEST = 600, 20  # characters of an answer
_WHAT = (
    "What does {name} do in Python?",
    "Please explain {name} to me.",
    "What is {name} for?",
    "I came across {name} in some Python code. What is it?",
)
_HOW = ("How is it called?", "Which arguments does it take?", "Show me its signature.")
_ABOUT = ("What does Python's reference say about {name}?", "Tell me about this part of Python: {name}.")

_NOT_ASKED = ("idlelib", "lib2to3", "turtledemo", "pydoc_data")  # no one's library

Row = dict[str, list[dict[str, str]]]
_Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def write_questions(path: Path) -> int:
    """Write the rows to ``path`` as JSON lines; returns their number. Raises UserError where that fails."""
    rows = list(questions())
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def questions() -> Iterator[Row]:
    """Rows of ``messages``, in the order of the files; an answer appears once."""
    seen: set[str] = set()
    for asked in _asked():
        answer = asked[0][1]
        if answer not in seen:
            seen.add(answer)
            yield {"messages": [message for pair in asked for message in _turn(*pair)]}


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _asked() -> Iterator[list[tuple[str, str]]]:
    """Conversations as pairs of question and answer."""
    source = StdlibSource()
    for file in source.files:
        parts = file.relative_to(source.root).with_suffix("").parts
        names = parts[:-1] if parts[-1] == "__init__" else parts
        if names and names[0] not in _NOT_ASKED and not any(name.startswith("_") for name in names):
            yield from _of_module(file, ".".join(names))
    for _, text in sorted(topics().items()):
        title, _, body = text.strip().partition("\n")
        if answer := _first_paragraph(re.sub(r"^\s*[*=~^\"-]{3,}\s*\n", "", body)):
            yield [(_chosen(_ABOUT, title).format(name=title), answer)]


def _of_module(file: Path, module: str) -> Iterator[list[tuple[str, str]]]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    yield from _described(tree, f"the module {module}", [])
    for node in tree.body:
        if isinstance(node, _Function) and not node.name.startswith("_"):
            yield from _of_function(node, f"{module}.{node.name}")
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _described(node, f"the class {module}.{node.name}", [])
            for method in node.body:
                if isinstance(method, _Function) and not method.name.startswith("_"):
                    yield from _of_function(method, f"{module}.{node.name}.{method.name}")


def _of_function(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[list[tuple[str, str]]]:
    signature = f"{name}({ast.unparse(node.args)})"
    more = [(_chosen(_HOW, name), f"It is called as `{signature}`.")] if len(signature) < _LONGEST else []
    yield from _described(node, name, more)


def _described(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
    name: str,
    more: list[tuple[str, str]],
) -> Iterator[list[tuple[str, str]]]:
    if answer := _first_paragraph(ast.get_docstring(node) or ""):
        yield [(_chosen(_WHAT, name).format(name=name), answer), *more]


def _first_paragraph(text: str) -> str | None:
    """None where it is no sentence, too short or too long."""
    first = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
    wanted = _SHORTEST <= len(first) <= _LONGEST and first[0].isalpha() and first[-1] in ".:!?"
    return first if wanted else None


def _chosen(forms: tuple[str, ...], name: str) -> str:
    return forms[hashlib.sha256(name.encode()).digest()[0] % len(forms)]
