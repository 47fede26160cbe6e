"""A chat template, compiled in a sandbox, with the helpers that transformers gives to templates.

The sandbox keeps a template from Python's attributes and from changing what it gets; it bounds neither time
nor memory, so that a template is code of its author. Nothing that a template gets changes from day to day.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from moetrain.data.chat.messages import Message, RowError
from moetrain.data.chat.words import CLOSE, OPEN, Span
from moetrain.errors import UserError, shortened

_MARKS = re.compile(f"([{OPEN}{CLOSE}])")
_SHOWN = 200  # characters of a template's error in a message


class Rendered(NamedTuple):
    """``spans``: what ``{% generation %}`` marks, in the order of the text; none without such marks."""

    text: str
    spans: tuple[Span, ...]


class ChatTemplate:
    """One template. ``words``: ``bos_token`` and the like; ``args``: further names, of the user.

    ``key``: where the options stand that messages name.
    """

    def __init__(
        self,
        text: str,
        label: str,
        words: Mapping[str, str],
        args: Mapping[str, Any],
        today: date,
        key: str = "data",
    ) -> None:
        self.label, self.key = label, key
        self._environment = _environment(today)
        self._given = {**words, **args}
        try:
            self._template = self._environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{label}, line {error.lineno}: {error.message}") from None
        except RecursionError:
            raise UserError(f"{label} is nested too deeply") from None
        self.marks_turns = bool(_marks(self._environment))

    def render(
        self, messages: Sequence[Message], tools: list[object] | None = None, prompt: bool = False
    ) -> Rendered:
        """The conversation as text; ``prompt``: with the beginning of an answer. Raises RowError.

        An error of the template is told by its own words, others by their kind.
        """
        try:
            text = self._template.render(
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self._given,
            )
        except _Raised as error:
            raise RowError(f"the chat template refuses it: {_line(error)}") from None
        except (jinja2.TemplateError, SecurityError, RecursionError, MemoryError) as error:
            raise RowError(f"the chat template fails: {_line(error)}") from None
        except Exception as error:  # whatever an operator or a filter of the template raises
            raise RowError(f"the chat template fails: {type(error).__name__}: {_line(error)}") from None
        return _without_marks(text) if self.marks_turns else Rendered(text, ())


class _Raised(jinja2.TemplateError):
    """What a template says by raise_exception."""


def _environment(today: date) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise,
        strftime_now=datetime(today.year, today.month, today.day).strftime,
        dict=_dict,
        namespace=_Namespace,
    )
    return environment


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}``: its text stands between two characters that no text has."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.environment.extend(turns_marked=True)
        inner = nodes.Scope(body, lineno=line)  # what it sets is not seen outside, as in transformers
        return [_literal(OPEN, line), inner, _literal(CLOSE, line)]


def _marks(environment: jinja2.Environment) -> object:
    return getattr(environment, "turns_marked", False)


def _literal(text: str, line: int) -> nodes.Node:
    return nodes.Output([nodes.TemplateData(text, lineno=line)], lineno=line)


def _without_marks(marked: str) -> Rendered:
    """Nested marks, and halves of one that a template cut, are the template's fault. Raises RowError."""
    pieces, spans = [], []
    length, begun = 0, None
    for piece in _MARKS.split(marked):
        if piece == OPEN and begun is None:
            begun = length
        elif piece == CLOSE and begun is not None:
            spans.append((begun, length))
            begun = None
        elif piece in (OPEN, CLOSE):
            raise RowError(
                "the chat template's generation marks are nested, or it cuts a text with one of them"
            )
        else:
            pieces.append(piece)
            length += len(piece)
    if begun is not None:
        raise RowError("the chat template cuts a text that has a generation mark")
    return Rendered("".join(pieces), tuple(spans))


def _raise(message: object) -> NoReturn:
    raise _Raised(str(message))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Not jinja2's, which escapes characters of HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """Instead of the class, whose attributes lead further."""
    return dict(*args, **kwargs)


class _Namespace(Namespace):
    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise SecurityError(f"namespace.{name}: a template sets no name that begins with _")
        super().__setitem__(name, value)


def _line(error: BaseException) -> str:
    return shortened(" ".join(str(error).split()) or type(error).__name__, _SHOWN)
