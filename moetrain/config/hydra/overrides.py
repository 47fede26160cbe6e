"""Overrides as typed on a command line, put into the words of Hydra's grammar; and reading ``plugins``."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from moetrain.config.hydra.store import variants
from moetrain.errors import UserError
from moetrain.flat import flat, lies_in

_MAY_BE_EMPTY = ("prompt", "train.sample_prompt")  # a document's beginning
_HYDRA_ALWAYS = ("hydra.searchpath", "hydra.mode")
_HYDRA_SWEEPS = (
    *("hydra.sweeper", "hydra.launcher", "hydra.callbacks", "hydra.job.env_set", "hydra.job.env_copy"),
    *("hydra.verbose", "hydra.job_logging", "hydra.hydra_logging"),
)
_HYDRA_FOLDERS = ("hydra.run", "hydra.sweep", "hydra.job.chdir", "hydra.output_subdir", "hydra.runtime")


def normalize(root: type, overrides: list[str], sweep: bool = False) -> list[str]:
    """Overrides as Hydra is to read them, for the config class ``root``.

    - Values of keys that hold text are quoted, so that paths and prompts are taken as they are: Hydra's
      grammar has no ``prompt=def f(x):``, and ``run.name=1e3`` would arrive as ``1000.0``. Left alone are
      quoted values, ``null``, interpolations (``${...}``), and in a sweep the choices (``a,b``).
    - An entry of a mapping (``data.parts.NAME``, ``compare.arms.NAME``) may be new: it needs no ``+``.
    """
    return [_normalize_one(root, o, sweep) for o in overrides]


def _normalize_one(root: type, override: str, sweep: bool) -> str:
    path = _path_of(override)
    if sweep and is_sweep(override):
        return override
    if any(h is str for h in _hints(root, path)):
        override = _quote(override)
    depth = _mapping_depth(root, path)
    if not depth or override.startswith("~") or "=" not in override:
        return override
    value = override.partition("=")[2]
    for name in reversed(path[depth:]):
        value = f"{{{name}: {value}}}"
    return f"++{'.'.join(path[:depth])}={value}"


def is_sweep(override: str) -> bool:
    try:
        return bool(OverridesParser.create().parse_override(override).is_sweep_override())
    except HydraException:
        return False


def refuse_hydra(overrides: list[str], sweep: bool) -> None:
    """UserError for an option of Hydra's own that would change nothing, or only where Hydra writes."""
    for override in overrides:
        key = re.split(r"[=@]", override.lstrip("+~"))[0].replace("/", ".")
        if not lies_in(key, ["hydra"]) or lies_in(key, _HYDRA_ALWAYS + (_HYDRA_SWEEPS if sweep else ())):
            continue
        instead = (
            "a run's folder is run.dir, or run.root/run.name, and nothing changes into it"
            if lies_in(key, _HYDRA_FOLDERS)
            else "leave it out"
        )
        where = "a sweep" if sweep else "a single run"
        raise UserError(f"{override}: Hydra's own option has no effect on {where}: {instead}")


def refuse_empty(cfg: Any) -> None:
    """UserError for text that is empty: as a path it would be the current folder, as a name none."""
    for key, value in flat(cfg).items():
        texts = value if isinstance(value, list) else [value]
        if key not in _MAY_BE_EMPTY and any(isinstance(t, str) and not t.strip() for t in texts):
            raise UserError(f"{key} is empty: give it a value, or leave it out")


def plugins_in(overrides: list[str]) -> list[str]:
    """The packages of the last ``plugins=[...]``; UserError where it is no list of names."""
    names: list[str] = []
    for override in overrides:
        if _path_of(override) != ["plugins"]:
            continue
        try:
            value = OverridesParser.create().parse_override(override).value()
        except HydraException as e:
            raise UserError(f"{override}: plugins is a list of packages, as in plugins=[my_routers]") from e
        listed: list[Any] = value if isinstance(value, list) else [value]
        names = [str(n) for n in listed if isinstance(n, str) and n]
        if len(names) < len(listed):
            raise UserError(f"{override}: plugins is a list of packages, as in plugins=[my_routers]")
    return names


def _path_of(override: str) -> list[str]:
    return override.partition("=")[0].lstrip("+").split(".")


def _quote(override: str) -> str:
    key, eq, text = override.partition("=")
    if not eq or text == "null" or "${" in text or re.fullmatch(r"(?s)'.*'|\".*\"", text):
        return override
    try:
        if OverridesParser.create().parse_override(override).value() == text:
            return override
    except (HydraException, ValueError):
        pass
    # In a quoted value only backslashes before a quote, or at the end, are escapes.
    escaped = re.sub(r"(\\*)'", lambda m: m.group(1) * 2 + r"\'", text)
    escaped = re.sub(r"(\\+)\Z", lambda m: m.group(1) * 2, escaped)
    return f"{key}='{escaped}'"


def _mapping_depth(root: type, path: list[str]) -> int:
    """How many parts of the path name a mapping: 2 for ``data.parts.NAME.kind``; 0 where there is none."""
    for depth in range(1, len(path) + 1):
        if any(get_origin(h) is dict for h in _hints(root, path[:depth])):
            return depth
    return 0


def _hints(hint: Any, path: list[str]) -> list[Any]:
    """The types that the key ``path`` below a config class may have, over all options of its group."""
    options = get_args(hint) if get_origin(hint) is Union else (hint,)
    if not path:
        return list(options)
    found = []
    for option in options:
        if get_origin(option) is dict:
            found += _hints(get_args(option)[1], path[1:])
        elif dataclasses.is_dataclass(option):
            below = [get_type_hints(option).get(path[0]), *variants().get(path[0], {}).values()]
            found += [h for b in below if b is not None for h in _hints(b, path[1:])]
    return found
