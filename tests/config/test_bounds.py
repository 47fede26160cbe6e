"""Ranges in the metadata of fields: every key that has one, on every command, and the words of the check."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, get_args, get_type_hints

import pytest

from moetrain.bounds import Range, above, at_least, check_ranges, range_of, range_refusal, within
from moetrain.config.hydra.compose import compose_app, compose_train
from moetrain.config.validate import (
    validate,
    validate_eval,
    validate_export,
    validate_generate,
    validate_upcycle,
    validate_verify,
)
from moetrain.convert.options import ExportConfig, UpcycleConfig
from moetrain.errors import UserError
from moetrain.evaluation.options import EvalConfig
from moetrain.moe.balance import CONTROLLERS, LOSSES
from moetrain.moe.balance.options import read_options
from moetrain.moe.routers import ROUTERS
from moetrain.train.options import GenerateConfig
from moetrain.upcycle import METHODS
from moetrain.verify.options import VerifyConfig

# What a rule over several fields bounds, or nothing does.
UNBOUNDED = {
    "compare.seeds",
    "data.tokenizer.vocab_size",
    "model.rope_scaling.beta_fast",
    "model.rope_scaling.high_freq_factor",
    "BlockFFNOptions: router.eps",
    "SparseMixerOptions: router.eps",
    "SparseMixer2Options: router.eps",
    "router.eval_top_k",
    "router.experts_per_token",
    "router.initial_experts",
    "router.margin",
    "router.max_experts",
    "router.route_scale",
    "router.salt",
    "router.threshold_decay",
    "router.top_groups",
    "router.top_k",
    "method.scale",
}

Case = tuple[Any, Callable[[Any], object]]  # a config, and what checks it


def cases() -> Iterator[Case]:
    part = "data.parts.a={kind: stdlib}"
    options = [[], ["optim=muon"], ["data=hub", "data.path=a/b"], ["data=mixture", part]]
    for overrides in [*options, *([f"router={name}"] for name in sorted(ROUTERS))]:
        yield compose_train(["model=tiny", *overrides]), validate
    yield compose_app(VerifyConfig, "verify", ["model=tiny"]), validate_verify
    yield compose_app(GenerateConfig, "generate", ["prompt=a", "checkpoint=x"]), validate_generate
    yield compose_app(EvalConfig, "eval", ["checkpoint=x"]), validate_eval
    yield compose_app(ExportConfig, "export", ["target=x", "checkpoint=x"]), validate_export
    train = compose_train(["model=tiny"])
    sections = {each.name: getattr(train, each.name) for each in fields(train)}
    for spec in METHODS.values():  # not composed: that would read the source
        yield UpcycleConfig(**sections, source="x", target="y", method=spec.options()), validate_upcycle


def numbers(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, Range | None, bool]]:
    """(key, the settings that hold it, its range, whether it is whole) of all that is or may be a number."""
    hints = get_type_hints(type(settings))
    for each in fields(settings):
        key, value = prefix + each.name, getattr(settings, each.name)
        inside = value if isinstance(value, list) else [value]
        parts = value.items() if isinstance(value, dict) else enumerate(inside)
        nested = [(name, part) for name, part in parts if is_dataclass(part)]
        for name, part in nested:
            yield from numbers(part, f"{key}." if part is value else f"{key}.{name}.")
        kinds = {hints[each.name], *get_args(hints[each.name])}
        if not nested and kinds & {int, float} and not isinstance(value, dict):
            yield key, settings, range_of(type(settings), each.name), int in kinds


def with_value(node: Any, key: str, value: object) -> Any:
    head, _, rest = key.partition(".")
    if isinstance(node, dict):
        return {**node, head: with_value(node[head], rest, value)}
    if isinstance(node, list):
        return [with_value(x, rest, value) if str(i) == head else x for i, x in enumerate(node)]
    old = getattr(node, head)
    new = (
        with_value(old, rest, value)
        if rest
        else (value,) * max(len(old), 1)
        if isinstance(old, tuple)
        else value
    )
    return replace(node, **{head: new})


def ends(bounds: Range, whole: bool) -> Iterator[tuple[float, float | None]]:
    """(the first number beyond an end, the last within it; None: there is no last)."""
    for end, is_open, away in ((bounds.low, bounds.open_low, -1), (bounds.high, bounds.open_high, 1)):
        if end is not None and is_open:
            yield float(end), None
        elif end is not None:
            yield (end + away if whole else math.nextafter(end, away * math.inf)), end


@pytest.fixture(scope="module")
def bounded() -> dict[str, tuple[Case, Range | None, bool]]:
    found: dict[str, tuple[Case, Range | None, bool]] = {}
    for cfg, check in cases():
        for key, settings, bounds, whole in numbers(cfg):
            found.setdefault(f"{type(settings).__name__}: {key}", ((cfg, check), bounds, whole))
    return found


def test_every_number_has_a_range_or_is_named_here(bounded):
    names = {name for name, (_, bounds, _) in bounded.items() if bounds is None}
    assert {name for name in names if not {name, name.partition(": ")[2]} & UNBOUNDED} == set()
    assert {"MoEPPOptions: router.tau", "MixturePart: data.parts.a.weight"} <= bounded.keys()


def test_every_range_is_refused_on_both_sides(bounded):
    for name, ((cfg, check), bounds, whole) in bounded.items():
        key = name.partition(": ")[2]
        for beyond, last in ends(bounds, whole) if bounds is not None else ():
            with pytest.raises(UserError) as caught:
                check(with_value(cfg, key, beyond))
            assert str(caught.value).startswith(f"{key}={beyond} must "), name
            assert "\n" not in str(caught.value)
            if last is not None:
                check_ranges(with_value(cfg, key, last))


@pytest.mark.parametrize("name", [*LOSSES, *CONTROLLERS])
def test_options_by_name_are_refused_on_both_sides(name):
    options = (LOSSES[name] if name in LOSSES else CONTROLLERS[name]).options
    for key, _, bounds, whole in numbers(options()):
        assert bounds is not None, f"{name}.{key}"
        for beyond, last in ends(bounds, whole):
            with pytest.raises(ValueError, match=rf"^{key}={beyond} must "):
                read_options(options, {key: beyond})
            if last is not None:
                read_options(options, {key: last})


@dataclass(frozen=True)
class Part:
    share: float = field(default=0.5, metadata=within(0, 1, open_low=True))


@dataclass(frozen=True)
class Settings:
    width: int = field(default=3, metadata=at_least(1, 7))
    factor: float | None = field(default=None, metadata=above(1, "it multiplies"))
    pair: tuple[float, ...] = field(default=(0.5, 0.5), metadata=within(0, 1, open_high=True))
    on: bool = False
    free: Any = 0
    parts: dict[str, Part] = field(default_factory=dict)


@dataclass(frozen=True)
class Wider(Settings):
    width: int = 5


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (Settings(width=0), "top.width=0 must be 1 or more"),
        (Settings(width=8), "top.width=8 must be 7 or less"),
        (Wider(width=0), "top.width=0 must be 1 or more"),
        (Settings(factor=1.0), "top.factor=1.0 must be above 1: it multiplies"),
        (Settings(factor=math.nan), "top.factor=nan must be a finite number"),
        (Settings(pair=(0.5, 1.0)), "top.pair=1.0 must lie in [0, 1)"),
        (Settings(parts={"a": Part(), "b": Part(0.0)}), "top.parts.b.share=0.0 must lie in (0, 1]"),
        (Settings(free=[1, [-math.inf]]), "top.free.1.0=-inf must be a finite number"),
        (Settings(free=2**63), "top.free=9223372036854775808 must be 9223372036854775807 or less"),
        (
            Settings(free={"x": -(2**63)}),
            "top.free.x=-9223372036854775808 must be -9223372036854775807 or more",
        ),
        (Settings(width=10**400), "top.width=a number of 401 digits or so must be 7 or less"),
        (Settings(), None),
        (Settings(7, 1.5, (), True, True, {"a": Part(1.0)}), None),
    ],
)
def test_the_line_names_key_value_and_range(settings, line):
    assert range_refusal(settings, "top") == line
