"""Mutations of JSON and YAML documents as trees.

A tree is a list, an :class:`Object` (pairs, since a key may come twice), a :class:`Raw` text or a scalar.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

SECRET = "fuzz-secret-8c1f2e"  # the value of the environment variable FUZZ_SECRET while a loader runs
MARKUP = "<img src=x onerror=fuzz()>"

Tree = Any
Path = tuple[int, ...]

_KEYS = (
    *("", "\0", "\ud800", "__class__", "_target_", "a/b", "step", "x" * 3000, MARKUP),
    *("\x1b[31m", "${oc.env:FUZZ_SECRET}"),
)


class Object(list):  # type: ignore[type-arg]
    """The (key, value) pairs of a JSON object."""


class Raw(str):
    """Text that stands in the document as it is."""


def _nested(depth: int, opening: str, closing: str, core: str = "") -> Raw:
    return Raw(opening * depth + core + closing * depth)


ODD: list[Tree] = [
    None, True, False, 0, 1, 2, -1, 3, 7, 0.5, -0.5, 1e-320, 1e308, "", "a", "7", "0.5", "null", "true",
    2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**300,
    Raw("1e999"), Raw("-1e999"), Raw("NaN"), Raw("Infinity"), Raw("-0.0"), Raw("1" * 5000), Raw("1e-999"),
    "\0", "a\0b", "\ud800", "\udfff\ud800", "\x1b[2J\x1b]0;title\x07", "two\nlines", "\r", "\u202egnp",
    "\x85", "\u2028",
    "../../../etc/passwd", "/dev/zero", "/", ".", "x" * 300, "x" * 5000, "é" * 70, "${oc.env:FUZZ_SECRET}",
    "${nope}",
    "${", "${.d_model}", "???", MARKUP, "[red]x[/red]", "[/]", "$\\frac", "%s%n", "{}", "-", "~",
    [], Object(), [[]], [1, 2, 3], [None], [0.5, "a"], Object([("a", 1)]), [[0.5, 0.5]],
    [Object()], [1] * 2000, Raw('"' + "x" * 10**6 + '"'), Raw("[" + "0," * 10**5 + "0]"),
    _nested(60, "[", "]"), _nested(1200, "[", "]"), _nested(100_000, "[", "]"), _nested(3000, '{"a":', "}",
    "1"),
]  # fmt: skip

YAML_ODD: list[Tree] = [
    Raw("!!timestamp x"), Raw("!!int x"), Raw("!!float x"), Raw("!!binary '*'"),
    Raw("!!python/object/apply:os.getcwd []"),
    Raw("!!python/name:os.system"), Raw("!unknown 1"), Raw("*nope"), Raw("&a [*a]"), Raw("&a 1"),
    Raw("2001-01-01"),
    Raw("2001-99-99"), Raw("0o17"), Raw("1_000"), Raw("0x10"), Raw("1:30"), Raw(".inf"), Raw(".nan"),
    Raw("no"), Raw("~"),
    Raw("!!set {a, b}"), Raw("!!omap [a: 1]"), Raw("{? [a, b] : c}"), Raw("{<<: {a: 1}, b: 2}"),
    Raw("{<<: 1}"),
    Raw("{a0: &a0 [1,1,1,1,1,1,1,1,1], "
        + ", ".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)) + "}"),
    Raw("'${oc.env:FUZZ_SECRET}'"), Raw("'${oc.env:FUZZ_SECRET,0.5}'"), Raw("'${oc.decode:\"[1,2]\"}'"),
    Raw("'${oc.create:{a: 1}}'"), Raw("'${model}'"), Raw("'${.}'"), Raw("'${oc.dict.keys:model}'"),
]  # fmt: skip


def parse(text: str | bytes) -> Tree:
    """A valid JSON text as a tree."""
    return json.loads(text, object_pairs_hook=Object)


def of(value: Any) -> Tree:
    """Plain values, such as a YAML loader gives, as a tree."""
    return parse(json.dumps(value))


def dump(tree: Tree) -> str:
    """The document in one line of JSON (for YAML: in its flow style). Lone surrogates are escaped."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, Object):
        return "{" + ", ".join(f"{dump(key)}: {dump(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(dump, tree)) + "]"
    text = json.dumps(tree)
    if isinstance(tree, float) and "e" in text and "." not in text:
        return text.replace("e", ".0e")  # YAML takes 1e-05 for a word
    return text


def mutate_tree(rng: Random, tree: Tree, odd: list[Tree] = ODD) -> tuple[Tree, str]:
    """A copy with one to three edits, and these in words. ``odd``: values that take a node's place."""
    notes = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        edit = rng.choice(_EDITS)
        path = _choose(rng, tree)
        tree, note = edit(rng, tree, path, odd)
        notes.append(note)
    return tree, "; ".join(notes)


def _choose(rng: Random, tree: Tree) -> Path:
    """A node, by a walk from the root: else a document's longest list would get nearly all edits."""
    path: Path = ()
    while isinstance(tree, list) and tree and (not path or rng.random() < 0.8):
        index = rng.randrange(len(tree))
        path = (*path, index)
        tree = _child(tree, index)
    return path


def _child(tree: Tree, index: int) -> Tree:
    return tree[index][1] if isinstance(tree, Object) else tree[index]


def _get(tree: Tree, path: Path) -> Tree:
    for index in path:
        tree = _child(tree, index)
    return tree


def _name(tree: Tree, path: Path) -> str:
    parts = []
    for index in path:
        parts.append(str(tree[index][0]) if isinstance(tree, Object) else str(index))
        tree = _child(tree, index)
    return ".".join(parts) or "the document"


def _with(tree: Tree, path: Path, value: Tree) -> Tree:
    """The tree with ``value`` at ``path``."""
    if not path:
        return value
    copy = type(tree)(tree)
    inner = _with(_child(tree, path[0]), path[1:], value)
    copy[path[0]] = (tree[path[0]][0], inner) if isinstance(tree, Object) else inner
    return copy


def _short(value: Tree) -> str:
    text = dump(value).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 40 else f"{text[:30]}... ({len(text)} characters)"


def _set(tree: Tree, path: Path, value: Tree) -> tuple[Tree, str]:
    return _with(tree, path, value), f"{_name(tree, path)} = {_short(value)}"


def _odd_value(rng: Random, tree: Tree, path: Path, odd: list[Tree]) -> tuple[Tree, str]:
    return _set(tree, path, rng.choice(odd))


def _near_value(rng: Random, tree: Tree, path: Path, odd: list[Tree]) -> tuple[Tree, str]:
    """Another value of the same type."""
    value = _get(tree, path)
    if isinstance(value, bool):
        near = not value
    elif isinstance(value, int):
        near = rng.choice(
            (value + 1, value - 1, -value, 2 * value, value // 2, value ^ 1 << rng.randrange(40))
        )
    elif isinstance(value, float):
        near = rng.choice((-value, 2 * value, value / 2, value + 1e-3, value * 1e200))
    elif isinstance(value, str) and not isinstance(value, Raw):
        at = rng.randrange(len(value) + 1)
        near = rng.choice(
            (
                value[:at],
                value + "x",
                value[:at] + rng.choice("a0/.:\x7fé") + value[at + 1 :],
                value.swapcase(),
            )
        )
    elif isinstance(value, list) and value:
        near = type(value)(rng.choice((value[:-1], value[1:], value + value[-1:], value[::-1])))
    else:
        near = rng.choice(odd)
    return _set(tree, path, near)


def _other_type(rng: Random, tree: Tree, path: Path, odd: list[Tree]) -> tuple[Tree, str]:
    """The same value as another type."""
    value = _get(tree, path)
    kinds: list[Tree] = [[value], Object([("value", value)]), dump(value)]
    if isinstance(value, int):
        kinds += [
            float(value) if abs(value) < 2**1000 else 0.0,
            value + 0.5 if abs(value) < 2**1000 else 0.5,
            str(value),
            bool(value),
        ]
    elif isinstance(value, float):
        kinds += [str(value), int(value) if abs(value) < 1e300 else 0]
    elif isinstance(value, Object):
        kinds += [[part for _, part in value], [list(pair) for pair in value]]
    elif isinstance(value, list):
        kinds += [Object((str(index), part) for index, part in enumerate(value))]
    return _set(tree, path, rng.choice(kinds))


def _remove(rng: Random, tree: Tree, path: Path, odd: list[Tree]) -> tuple[Tree, str]:
    if not path:
        return _set(tree, path, rng.choice(odd))
    parent = _get(tree, path[:-1])
    return _with(
        tree, path[:-1], type(parent)(parent[: path[-1]] + parent[path[-1] + 1 :])
    ), f"no {_name(tree, path)}"


def _twice(rng: Random, tree: Tree, path: Path, odd: list[Tree]) -> tuple[Tree, str]:
    """An item or a key again, as it is or with another value."""
    if not path:
        return _set(tree, path, [tree, tree])
    parent = _get(tree, path[:-1])
    again = rng.choice((_child(parent, path[-1]), rng.choice(odd)))
    item = (parent[path[-1]][0], again) if isinstance(parent, Object) else again
    at = rng.choice((path[-1], len(parent)))
    return (
        _with(tree, path[:-1], type(parent)([*parent[:at], item, *parent[at:]])),
        f"{_name(tree, path)} again: {_short(again)}",
    )


def _swap(rng: Random, tree: Tree, path: Path, odd: list[Tree]) -> tuple[Tree, str]:
    """The values of two siblings trade places."""
    if not path:
        return _set(tree, path, rng.choice(odd))
    parent = _get(tree, path[:-1])
    other = (*path[:-1], rng.randrange(len(parent)))
    swapped = _with(_with(tree, path, _get(tree, other)), other, _get(tree, path))
    return swapped, f"{_name(tree, path)} and {_name(tree, other)} swapped"


def _copy(rng: Random, tree: Tree, path: Path, odd: list[Tree]) -> tuple[Tree, str]:
    """Another node's value."""
    source = _choose(rng, tree)
    return _with(tree, path, _get(tree, source)), f"{_name(tree, path)} = {_name(tree, source)}"


def _rename(rng: Random, tree: Tree, path: Path, odd: list[Tree]) -> tuple[Tree, str]:
    """A key by another name, or one more key."""
    while path and not isinstance(_get(tree, path[:-1]), Object):
        path = path[:-1]
    if not path:
        return _set(tree, path, rng.choice(odd))
    parent = _get(tree, path[:-1])
    key, value = parent[path[-1]]
    name, known = str(key), rng.choice(parent)[0]
    new = rng.choice((name[:-1], f"{name}x", name.upper(), known, *_KEYS))
    pairs = list(parent)
    if rng.random() < 0.5:
        pairs[path[-1]] = (new, value)
        note = f"{_name(tree, path)} is called {_short(new)}"
    else:
        value = rng.choice((value, rng.choice(odd)))
        pairs.append((new, value))
        note = f"one more key beside {_name(tree, path)}: {_short(new)}: {_short(value)}"
    return _with(tree, path[:-1], Object(pairs)), note


_EDITS = [
    *[_odd_value] * 4,
    *[_near_value] * 2,
    *[_other_type] * 2,
    _remove,
    _twice,
    _swap,
    _copy,
    *[_rename] * 2,
]
