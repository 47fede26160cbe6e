"""All that reaches the terminal: text from outside without control characters, in any encoding.

``show`` prints what a command is for, and fails where it cannot be written; ``tell`` prints how a long work
goes on, and never ends it. Nothing else in the package calls ``print``. ``set_up`` covers what others print.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, cast

from moetrain.errors import UserError
from moetrain.redaction import redacted

if TYPE_CHECKING:
    from rich.console import Console

# C0 and C1 but newline and tab; marks and overrides of direction; line separators; surrogates; tags.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)
_LONE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # surrogates that stand for no byte


class OutputError(UserError):
    """Standard output takes no more."""

    exit_code = 1


def as_text(text: str) -> str:
    """Text that every encoding of Unicode takes.

    Where the locale's encoding cannot express an argument or a file name, Python gives its bytes as
    surrogates: they are read as UTF-8 here. What is no UTF-8 becomes U+FFFD.
    """
    if text.isascii():
        return text
    return _LONE.sub("\ufffd", text).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def printable(text: str, encoding: str | None = None) -> str:
    """``text`` without secrets, what acts on a terminal or turns text around, and what ``encoding`` lacks."""
    text = _UNSAFE.sub("\ufffd", as_text(redacted(text)))
    encoding = encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def one_line(text: str) -> str:
    """``text`` printable, and on one line."""
    return printable(" ".join(text.split()))


def show(text: str = "", end: str = "\n") -> None:
    """Print what a command is for. Raises OutputError, or BrokenPipeError where the reader has gone."""
    with _writing(sys.stdout) as stream:
        stream.write(printable(text, getattr(stream, "encoding", None)) + end)
        stream.flush()


def tell(text: str, stream: TextIO | None = None) -> None:
    """Print a line, to standard output without ``stream``; one that takes no more is given no more."""
    stream = stream or sys.stdout
    try:
        stream.write(printable(text, getattr(stream, "encoding", None)) + "\n")
        stream.flush()
    except (OSError, ValueError):  # ValueError: it is closed
        _silence(stream)


def console() -> Console:
    """For tables: rich without markup, whose cells and titles are printable, and whose errors are show's."""
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text, self.encoding), **options)

        def _check_buffer(self) -> None:
            with _writing(cast(TextIO, self.file)):
                super()._check_buffer()

    return PlainConsole(markup=False, highlight=False, emoji=False)


class LineFormatter(logging.Formatter):
    """Log records as printable lines."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), getattr(sys.stderr, "encoding", None))


def set_up() -> None:
    """Make standard output and error take any character, exist, and show tracebacks and logs printable."""
    _open_missing()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.excepthook = _show_traceback
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler])  # does nothing where a caller has set logging up


def finish(code: int) -> int:
    """The exit code, after what is left to write: 1 instead of 0 where it could not be written."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _silence(sys.stdout)
        return code or 1
    except (OSError, ValueError) as error:
        _silence(sys.stdout)
        tell(f"moetrain: error: {_no_output(error)}", sys.stderr)
        return code or 1
    return code


@contextlib.contextmanager
def _writing(stream: TextIO) -> Iterator[TextIO]:
    try:
        yield stream
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        _silence(stream)
        raise OutputError(_no_output(error)) from None


def _no_output(error: Exception) -> str:
    return f"standard output cannot be written: {getattr(error, 'strerror', None) or error}"


def _silence(stream: TextIO) -> None:
    """Point the stream's descriptor at nothing, so that what is buffered raises no second error at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def _open_missing() -> None:
    """A closed descriptor 0, 1 or 2 would become that of the next file, and prints would go into it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest one that is free
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    tell("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), sys.stderr)
