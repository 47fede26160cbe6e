"""Frozen dataclasses at OmegaConf's edge: an editable twin going in, the frozen original coming out.

OmegaConf makes every frozen dataclass a read-only node, which would refuse overrides. So the schema's
classes are mirrored, field by field, into plain dataclasses of the same names; Hydra composes those,
and ``freeze`` turns the finished object into the original, immutable classes.
"""

from __future__ import annotations

import dataclasses
import importlib
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_ORIGINAL = "_moetrain_original"
_MIRROR_OF = "mirror of "


@cache
def editable(cls: type) -> type:
    """The mutable mirror of a frozen dataclass; nested dataclasses and base classes are mirrored too."""
    bases = tuple(editable(b) for b in cls.__bases__ if dataclasses.is_dataclass(b))
    hints = get_type_hints(cls)
    specs = [(f.name, _mirror_hint(hints[f.name]), _mirror_field(f)) for f in dataclasses.fields(cls)]
    place = f"{_MIRROR_OF}{cls.__module__}:{cls.__qualname__}".replace(".", "/")
    namespace = {_ORIGINAL: cls, "__module__": __name__, "__qualname__": place, "__doc__": cls.__doc__}
    return dataclasses.make_dataclass(cls.__name__, specs, bases=bases, namespace=namespace)


def __getattr__(name: str) -> Any:
    """A mirror by its ``__qualname__``, so that another process that unpickles one has its own (submitit)."""
    if not name.startswith(_MIRROR_OF):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, qualname = name.removeprefix(_MIRROR_OF).replace("/", ".").partition(":")
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return editable(found)


def original(cls: type) -> type:
    """The frozen class that ``cls`` mirrors; ``cls`` itself where it mirrors none."""
    found: type = cls.__dict__.get(_ORIGINAL, cls)
    return found


def freeze(value: Any) -> Any:
    """Mirrors inside ``value`` become the frozen originals; lists become tuples where a field says so."""
    if isinstance(value, list):
        return [freeze(v) for v in value]
    if isinstance(value, dict):
        return {k: freeze(v) for k, v in value.items()}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    cls = original(type(value))
    hints = get_type_hints(cls)
    values = {f.name: freeze(getattr(value, f.name)) for f in dataclasses.fields(cls)}
    return cls(**{k: tuple(v) if get_origin(hints[k]) is tuple else v for k, v in values.items()})


def _mirror_field(f: dataclasses.Field[Any]) -> Any:
    factory = f.default_factory
    if isinstance(factory, type) and dataclasses.is_dataclass(factory):
        return dataclasses.field(default_factory=editable(factory))
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory)
    return dataclasses.field(default=f.default)


def _mirror_hint(hint: Any) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return editable(hint)
    args = tuple(_mirror_hint(a) for a in get_args(hint))
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return Union[args]
    return origin[args] if origin is not None else hint
