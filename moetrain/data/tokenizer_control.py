"""Texts in which some words are control tokens and the same words elsewhere are text.

Shapes: N tokens of a text, C control words in it, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers

from moetrain.data.documents import Spans
from moetrain.data.tokenizer_spec import library_errors
from moetrain.errors import UserError

Ints = npt.NDArray[np.int64]


class Placed(NamedTuple):
    """The tokens of a text, and the character at which each begins; bytes of a character begin together."""

    ids_N: Ints
    starts_N: Ints


class ControlEncoder:
    """``twin`` knows the special words by the names ``names_of`` only (:func:`for_control_words`).

    ``special_V``: the ids that no text may yield, but where a control word stands.
    """

    def __init__(
        self,
        twin: tokenizers.Tokenizer,
        names_of: Mapping[str, str],
        special_V: npt.NDArray[np.bool_],
        label: str,
    ) -> None:
        self._twin, self._names_of, self._special_V, self._label = twin, names_of, special_V, label

    def encode(self, texts: Sequence[str], control: Sequence[Spans]) -> list[Placed]:
        """Raises UserError where text yields a special token, or a control word none."""
        renamed = [_renamed(text, spans, self._names_of) for text, spans in zip(texts, control, strict=True)]
        with library_errors(f"{self._label} cannot encode a text"):
            encodings = self._twin.encode_batch([each.text for each in renamed], add_special_tokens=False)
        found = []
        for encoding, each in zip(encodings, renamed, strict=True):
            ids_N = np.array(encoding.ids, np.int64)
            special = int(self._special_V[ids_N].sum())
            expected = sum(int(self._special_V[self._twin.token_to_id(name)]) for name in each.names)
            if special != expected:
                raise UserError(
                    f"{self._label} makes {special} special tokens of a text with {expected} control words; "
                    "give unknown text a token of its own (unk_token)"
                )
            starts_N = np.array([start for start, _ in encoding.offsets], np.int64)
            found.append(Placed(ids_N, each.original(starts_N)))
        return found


def placed_bytes(text: str, control: Spans, eos_id: int) -> Placed:
    """The bytes of ``text``, each control word as the one token ``eos_id``."""
    widths = np.array([len(char.encode()) for char in text], np.int64)
    starts_N = np.repeat(np.arange(len(text)), widths)
    ids_N = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    kept_N = np.ones(len(ids_N), bool)
    for start, stop in control:
        first, last = np.searchsorted(starts_N, (start, stop))
        kept_N[first + 1 : last] = False
        ids_N[first] = eos_id
    return Placed(ids_N[kept_N], starts_N[kept_N])


class _Renamed(NamedTuple):
    """A text in which control words have other names, where they begin, and how much longer each is."""

    text: str
    names: list[str]
    begins_C: Ints
    growth_C: Ints

    def original(self, places_N: Ints) -> Ints:
        """The places in the text as it was, of places that are not within a name."""
        total = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.growth_C)])
        moved_N: Ints = places_N - total[np.searchsorted(self.begins_C, places_N, side="left")]
        return moved_N


def _renamed(text: str, control: Spans, names_of: Mapping[str, str]) -> _Renamed:
    pieces: list[str] = []
    names, begins, growth = [], [], []
    place = length = 0
    for start, stop in control:
        name = names_of[text[start:stop]]
        begins.append(length + start - place)
        growth.append(len(name) - (stop - start))
        names.append(name)
        pieces += [text[place:start], name]
        length = begins[-1] + len(name)
        place = stop
    pieces.append(text[place:])
    return _Renamed("".join(pieces), names, np.array(begins, np.int64), np.array(growth, np.int64))
