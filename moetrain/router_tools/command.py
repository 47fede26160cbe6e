"""``moetrain router list`` and ``moetrain router check NAME``."""

from __future__ import annotations

import argparse

from rich.table import Table

from moetrain.errors import UserError
from moetrain.moe.routers import ROUTERS, build_router
from moetrain.nearest import nearest
from moetrain.plugins import import_plugins
from moetrain.router_tools.check import check_router
from moetrain.terminal import console, show


def router_command(argv: list[str]) -> int:
    """Returns the exit code: 1 where a check fails. Raises UserError for an unknown name or plug-in."""
    parser = argparse.ArgumentParser(
        prog="moetrain router", description="The routers there are, and checks for one of your own."
    )
    parser.add_argument("action", choices=["list", "check"])
    parser.add_argument(
        "words", nargs="*", metavar="NAME", help="of the router to check, and plugins=[package]"
    )
    args = parser.parse_args(argv)
    plugins = [word for word in args.words if word.startswith("plugins=")]
    names = [word for word in args.words if word not in plugins]
    for word in plugins:
        packages = word.removeprefix("plugins=").strip("[]").split(",")
        import_plugins([package.strip() for package in packages if package.strip()])
    if args.action == "list":
        if names:
            raise UserError(f"router list takes no name, not {names[0]}")
        return _list()
    if len(names) != 1:
        raise UserError(
            "router check takes one name, as in moetrain router check my_router plugins=[my_package]"
        )
    return _check(names[0])


def _list() -> int:
    table = Table(box=None, pad_edge=False)
    for column in ("router", "assigns", "state", "causal", "source"):
        table.add_column(column, no_wrap=column == "router")
    for name, spec in sorted(ROUTERS.items()):
        table.add_row(name, spec.returns, _state(name), "yes" if spec.cls.causal else "no", spec.paper)
    console().print(table)
    return 0


def _state(name: str) -> str:
    """What it learns or carries: parameters, and buffers other than the bias that every router has."""
    router = build_router(name, d_model=4, num_experts=4)
    buffers = [key for key, _ in router.named_buffers() if key != "bias_E"]
    return ", ".join([*(key for key, _ in router.named_parameters()), *buffers]) or "none"


def _check(name: str) -> int:
    if name not in ROUTERS:
        raise UserError(
            f"router check {name}: there is no such router{nearest(name, ROUTERS)}; "
            "one of your own needs plugins=[package]"
        )
    outcomes = check_router(name)
    for outcome in outcomes:
        show(f"{'ok    ' if outcome.failure is None else 'FAILED'}  {outcome.name}")
        if outcome.failure is not None:
            show(f"        {outcome.failure}")
    failed = sum(outcome.failure is not None for outcome in outcomes)
    show(f"router {name}: {len(outcomes) - failed} of {len(outcomes)} checks hold")
    return 1 if failed else 0
