"""What is said of rows that are left out, and of special words in the text of messages."""

from __future__ import annotations

import logging

from moetrain.data.chat.settings import Broken
from moetrain.errors import UserError

_NAMED = 20  # rows; the others are counted
log = logging.getLogger("moetrain.data")


class LeftOut:
    """Of one pass over a source. ``silent``: it was said in an earlier pass. ``key``: where options stand."""

    def __init__(self, label: str, policy: Broken, silent: bool, key: str = "data") -> None:
        self._label, self._policy, self._silent, self._key = label, policy, silent, key
        self._first: UserError | None = None
        self._special: tuple[str, str] | None = None
        self.used = self.left_out = self.with_words = 0

    def broken(self, error: UserError) -> None:
        """Count a row that cannot be used, or raise its error."""
        if self._policy is Broken.refuse:
            raise UserError(f"{error}; {self._key}.on_broken=skip leaves such rows out") from None
        self._first = self._first or error
        self.left_out += 1
        if not self._silent and self.left_out <= _NAMED:
            log.warning("left out: %s", error)

    def special(self, word: str, where: str) -> None:
        """Count a row whose messages have special words, which stay text."""
        self._special = self._special or (word, where)
        self.with_words += 1

    def finish(self) -> None:
        """Say the sums. Raises UserError where no row was used."""
        if self._first is not None and not self.used:
            raise UserError(f"{self._label}: all {self.left_out} rows are broken; the first: {self._first}")
        if self._silent:
            return
        if self.left_out:
            log.warning(
                "%s: %d of %d rows are left out", self._label, self.left_out, self.left_out + self.used
            )
        if self._special is not None:
            word, where = self._special
            log.warning(
                "%s: %d rows have the tokenizer's special words in their text, where they stay text; "
                "the first: %r in %s (%s.special_words)",
                *(self._label, self.with_words, word, where, self._key),
            )
