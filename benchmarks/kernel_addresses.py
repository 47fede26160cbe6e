"""Which 32-bit products reach an address: a walk backward over a kernel's Triton IR, before any optimiser.

An address is the offset of ``tt.addptr``. It is followed to all it is computed from, through loops and
branches, up to the loads, arguments and program ids. A 32-bit product of two values that are known at run
time only, or of one with a constant above ``BLOCK``, is a fault: an index times a stride passes 2^31. An
index times a block's size stays an index. Sums are not looked at: those of indices are indices.

That shows each product on the way of an address, and no more: not that a 32-bit argument holds its value, nor
that an index of fewer than 2^31 rows is right. Where the walk cannot tell a loop's values apart it takes all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BLOCK = 256
_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_RESULT = re.compile(r"^\s*(%[\w$.-]+)(?::(\d+))? = (.*)$")
_CONSTANT = re.compile(r'^"?arith\.constant"? (?:dense<)?(-?\d+|true|false)?')
_ITER = re.compile(r"iter_args\((.*?)\) ->")
_BRANCH = re.compile(r"(\^\w+)(?:\(([^:)]*)[^)]*\))?")
_LOC = re.compile(r"\s+loc\(.*$")


@dataclass
class _Graph:
    """What each value is computed from, the constants, the 32-bit products, and the offsets of addresses."""

    sources: dict[str, set[str]] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)
    products: dict[str, tuple[str, str]] = field(default_factory=dict)
    shifts: set[str] = field(default_factory=set)  # the products that are written as shifts
    offsets: list[str] = field(default_factory=list)
    wide_products: int = 0

    def add(self, value: str, *sources: str) -> None:
        self.sources.setdefault(value, set()).update(sources)


@dataclass
class _Region:
    """An operation with a body: its results, what its body begins with, and whether these go by position."""

    results: list[str]
    carried: list[str]
    by_position: bool


def narrow_products(ttir: str) -> list[str]:
    """One line for each 32-bit product that reaches an address and is no block's start."""
    return sorted({fault for graph in _graphs(ttir) for fault in _faults(graph)})


def wide_products(ttir: str) -> int:
    """The number of 64-bit integer products."""
    return sum(graph.wide_products for graph in _graphs(ttir))


def _faults(graph: _Graph) -> Iterator[str]:
    seen: set[str] = set()
    waiting = list(graph.offsets)
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        waiting += graph.sources.get(value, ())
        if value in graph.products:
            known = [graph.constants[v] for v in _through(graph, graph.products[value]) if v is not None]
            limit = BLOCK.bit_length() - 1 if value in graph.shifts else BLOCK
            if not known or min(map(abs, known)) > limit:
                yield f"{value} = {' x '.join(graph.products[value])} in 32 bits reaches an address"


def _through(graph: _Graph, factors: tuple[str, str]) -> Iterator[str | None]:
    """Each factor's constant, looked for behind splats and broadcasts of one source."""
    for value in factors:
        while value not in graph.constants and len(graph.sources.get(value, ())) == 1:
            (value,) = graph.sources[value]
        yield value if value in graph.constants else None


def _graphs(ttir: str) -> Iterator[_Graph]:
    """One graph a function; names are a function's own."""
    for text in re.split(r"(?=^\s*tt\.func )", ttir, flags=re.M)[1:]:
        graph = _Graph()
        regions: list[_Region] = []
        for line in text.splitlines()[1:]:
            _read(graph, regions, _LOC.sub("", line))
        yield graph


def _read(graph: _Graph, regions: list[_Region], line: str) -> None:
    found = _RESULT.match(line)
    name, body = (found[1], found[3]) if found else ("", line.strip())
    count = int(found[2] or 1) if found else 0
    results = [name] if count == 1 else [f"{name}#{i}" for i in range(count)]
    if body.startswith("}"):
        if regions and "else" not in body and "do" not in body:
            regions.pop()
        return
    if body.startswith("^"):  # a block with its arguments
        label, _, rest = body.partition("(")
        for position, value in enumerate(_VALUE.findall(rest.split("):")[0])):
            graph.add(value, f"{label}#{position}", *(regions[-1].carried if regions else ()))
        return
    if body.startswith(("cf.", "scf.yield", "scf.condition")):
        _leave(graph, regions, body)
        return
    operands = _VALUE.findall(body)
    if line.rstrip().endswith("{"):
        regions.append(_enter(graph, results, body, operands))
        return
    for result in results:
        _operation(graph, result, body, operands)


def _operation(graph: _Graph, result: str, body: str, operands: list[str]) -> None:
    kind = body.split(" ", 1)[0].strip('"')
    kind = kind.partition("(")[0].rstrip('"')
    constant = _CONSTANT.match(body)
    if constant:
        graph.constants[result] = int(constant[1]) if (constant[1] or "").lstrip("-").isdigit() else 0
        return
    if kind in ("tt.load", "tt.atomic_rmw", "tt.descriptor_load"):
        graph.add(result)  # what it loads is no product; where from is an address of its own
        return
    if kind == "tt.addptr":
        graph.offsets.append(operands[1])
    if kind in ("arith.muli", "arith.shli"):
        if re.search(r"i64>?$", body.rstrip()):
            graph.wide_products += 1
        else:
            graph.products[result] = (operands[0], operands[1])
            graph.shifts |= {result} if kind == "arith.shli" else set()
    graph.add(result, *operands)


def _enter(graph: _Graph, results: list[str], body: str, operands: list[str]) -> _Region:
    """The results of a loop are what it began with or yields; ``scf.if`` has only what it yields."""
    found = _ITER.search(body)
    if body.startswith("scf.for") and found:
        pairs = [pair.split("=") for pair in found[1].split(",")]
        carried = [inner.strip() for inner, _ in pairs]
        for (inner, first), result in zip(pairs, results, strict=True):
            graph.add(inner.strip(), first.strip())
            graph.add(result, first.strip())
        return _Region(results, carried, True)
    if body.startswith(("scf.if", "scf.for")):
        return _Region(results, [], True)
    for result in results:  # a reduction, a scan, a while: everything may reach everything
        graph.add(result, *operands)
    return _Region(results, operands, False)


def _leave(graph: _Graph, regions: list[_Region], body: str) -> None:
    values = _VALUE.findall(body.split(" : ")[0])
    if body.startswith("cf."):
        for label, passed in _BRANCH.findall(body):
            for position, value in enumerate(_VALUE.findall(passed)):
                graph.add(f"{label}#{position}", value)
        return
    if not regions:
        return
    region = regions[-1]
    for values_of in (region.results, region.carried):
        for position, value in enumerate(values_of):
            graph.add(value, *(values[position : position + 1] if region.by_position else values))
