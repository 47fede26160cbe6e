"""Special words of a tokenizer in the text of messages: hidden from the template, so that they stay text.

A word such as ``<|im_end|>`` is a control token where the template wrote it, and six pieces of text where a
user did. Rendered text shows no difference, so the first character of each word in a message is replaced by a
character that stands for it (private use, plane 16) before the template sees it, and put back afterwards:
the words that are whole in the rendered text are the template's. Lengths do not change.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from moetrain.data.chat.messages import RowError

_BASE = 0x10FE00
_RESERVED = re.compile("[\U0010fe00-\U0010ffff]")
OPEN, CLOSE = "\U0010fff0", "\U0010fff1"  # around what {% generation %} marks

Span = tuple[int, int]  # characters: from the first, up to the second


class Words(NamedTuple):
    """``special``: what text never yields. ``eos`` ends a text; ``bos``, where there is one, begins it."""

    special: frozenset[str]
    eos: str
    bos: str | None = None


class Hider:
    """Hides the special words in messages and finds those of a template in what it rendered."""

    def __init__(self, special: Collection[str]) -> None:
        ordered = sorted(filter(None, special), key=len, reverse=True)  # of two at one place, the longer
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        firsts = sorted({word[0] for word in ordered})
        self._stand_in = {first: chr(_BASE + place) for place, first in enumerate(firsts[:0x1F0])}
        self._restored = {ord(stand_in): first for first, stand_in in self._stand_in.items()}

    def found(self, value: object) -> list[str]:
        """The special words in texts of ``value``, plain JSON. Raises RowError for reserved characters."""
        return [word for text in texts_of(value) for word in self._in(text)]

    def _in(self, text: str) -> list[str]:
        if (reserved := _RESERVED.search(text)) is not None:
            raise RowError(
                f"it holds the character U+{ord(reserved[0]):X}, of those that mark a template's output"
            )
        words: list[str] = self._pattern.findall(text) if self._pattern else []
        return words

    def hide(self, value: object) -> object:
        """``value`` with every special word's first character replaced."""
        if isinstance(value, str):
            if self._pattern is None:
                return value
            return self._pattern.sub(lambda word: self._stand_in[word[0][0]] + word[0][1:], value)
        if isinstance(value, dict):
            return {self.hide(name): self.hide(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self.hide(each) for each in value]
        return value

    def control(self, rendered: str) -> tuple[Span, ...]:
        """Where the template's own special words are in a text that still hides the others."""
        return tuple(word.span() for word in self._pattern.finditer(rendered)) if self._pattern else ()

    def restore(self, rendered: str) -> str:
        return rendered.translate(self._restored)


def texts_of(value: object) -> Iterator[str]:
    """All texts in plain JSON, names too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from texts_of(name)
            yield from texts_of(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from texts_of(each)
