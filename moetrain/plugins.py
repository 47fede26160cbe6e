"""Plug-ins: packages that register routers, losses, layers, tasks or families when they are imported."""

from __future__ import annotations

import importlib

from moetrain.errors import UserError


def import_plugins(names: list[str]) -> None:
    """Import the named packages, which register what they bring. UserError where one cannot be imported."""
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as e:
            if e.name is None or not (name == e.name or name.startswith(f"{e.name}.")):
                raise  # the plugin itself was found; the import that fails is its own
            raise UserError(
                f"plugins=[{name}]: there is no module {name}; it must be importable: "
                "install it, or add its folder to PYTHONPATH"
            ) from e
