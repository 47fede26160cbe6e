"""What a tokenizer.json says: its schema, checks that the library omits, and how text is kept plain text."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import tokenizers
from pydantic import Field

from moetrain.errors import UserError
from moetrain.files import parse_json

_Id = Annotated[int, Field(ge=0, lt=2**32)]
_SPARE = 2**16  # ids that a vocabulary may leave out, beside as many as it has


@dataclass(frozen=True)
class Added:
    """A token that the library looks for before the model does; special ones are not looked for in text."""

    id: _Id
    content: str
    special: bool


@dataclass(frozen=True)
class Model:
    vocab: dict[str, _Id] | list[tuple[str, float]]  # a list, of pieces and scores, is Unigram's
    type: str | None = None
    merges: list[tuple[str, str]] | list[str] | None = None  # BPE's
    unk_token: str | None = None
    unk_id: int | None = None
    ignore_merges: bool = False
    byte_fallback: bool = False
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None

    def ids(self) -> dict[str, int]:
        if isinstance(self.vocab, dict):
            return self.vocab
        return {piece: index for index, (piece, _) in enumerate(self.vocab)}

    def pairs(self) -> Iterator[tuple[str, str]]:
        """The merges, of which older files write both halves in one string."""
        for merge in self.merges or ():
            left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
            yield left, right

    def merged(self, left: str, right: str) -> str:
        return left + right[len(self.continuing_subword_prefix or "") :]


@dataclass(frozen=True)
class Spec:
    model: Model
    added_tokens: list[Added] | None = None
    pre_tokenizer: object = None
    decoder: object = None

    @property
    def unk_id(self) -> int | None:
        """The id that stands for text outside the vocabulary."""
        if isinstance(self.model.vocab, list):
            return self.model.unk_id
        return None if self.model.unk_token is None else self.model.vocab.get(self.model.unk_token)

    @property
    def byte_level(self) -> bool:
        return "ByteLevel" in json.dumps([self.pre_tokenizer, self.decoder])


def read_spec(data: bytes | str, where: str) -> Spec:
    """The tokenizer.json ``data``. Raises UserError for one that the library takes badly."""
    spec = parse_json(data, Spec, where)
    ids = spec.model.ids()
    most = max((*ids.values(), *(token.id for token in spec.added_tokens or ())), default=-1)
    if most >= 2 * len(ids) + _SPARE:
        raise UserError(f"{where}: its largest id is {most}, though it has {len(ids)} tokens")
    for left, right in spec.model.pairs():
        for token in (left, right, spec.model.merged(left, right)):
            if token not in ids:
                raise UserError(f"{where}: the merge of {left!r} and {right!r} names no token ({token!r})")
    return spec


def for_text(tokenizer: tokenizers.Tokenizer, spec: Spec, eos_token: str) -> tokenizers.Tokenizer:
    """A tokenizer of the same ids that finds no special token in text, ``tokenizer`` itself where it can be.

    The library takes special tokens for text (``encode_special_tokens``), and then the model may find them in
    its own vocabulary: a Unigram model takes ``</s>`` for one piece. In the twin such pieces have names that
    no text can know, so that the model does as if it had none of them, as sentencepiece does.
    """
    names = {token.content for token in spec.added_tokens or () if token.special} | {eos_token}
    hidden = _within_reach(spec.model, names)
    loose = any(token.content == eos_token and not token.special for token in spec.added_tokens or ())
    if not hidden and not loose:
        return tokenizer
    names_of = {name: f"{secrets.token_hex(16)}" for name in hidden}
    raw = json.loads(tokenizer.to_str())
    _rename(raw["model"], spec.model, names_of)
    for token in raw["added_tokens"]:
        token["special"] = token["special"] or token["content"] == eos_token
        token["content"] = names_of.get(token["content"], token["content"])
    twin = tokenizers.Tokenizer.from_str(json.dumps(raw))
    twin.encode_special_tokens = True
    return twin


def for_control_words(
    tokenizer: tokenizers.Tokenizer, spec: Spec, names: Set[str]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """A tokenizer of the same ids that knows the special words ``names`` by other names only; those names.

    A text in which some of the words have these names gets control tokens there, and plain text where the
    words stand as they are. Places of tokens in the text include the spaces that belong to them.
    """
    names_of = {name: secrets.token_hex(16) for name in names}
    raw = json.loads(tokenizer.to_str())
    _rename(raw["model"], spec.model, names_of)
    for token in raw["added_tokens"]:
        if token["content"] in names_of:
            token |= {"content": names_of[token["content"]], "special": True, "normalized": False}
    known = {token.content for token in spec.added_tokens or ()}
    for name in sorted(names - known):  # of the model's own vocabulary
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        raw["added_tokens"].append(
            {"id": spec.model.ids()[name], "content": names_of[name], "special": True, **flags}
        )
    raw["post_processor"] = None
    twin = tokenizers.Tokenizer.from_str(json.dumps(raw))
    twin.encode_special_tokens = False
    return twin, names_of


def is_byte(token: str) -> bool:
    """Whether the token stands for one byte, in SentencePiece's spelling."""
    return re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token) is not None


def _within_reach(model: Model, names: set[str]) -> set[str]:
    """Those of ``names`` that the model itself might make of text."""
    found = names & model.ids().keys()
    if model.byte_fallback:
        found = {name for name in found if not is_byte(name)}
    whole = model.ignore_merges or model.continuing_subword_prefix or model.end_of_word_suffix
    if model.type != "BPE" or whole:
        return found
    made = {model.merged(*pair) for pair in model.pairs()}
    return {name for name in found if len(name) == 1 or name in made}


def _rename(raw: dict[str, Any], model: Model, names_of: dict[str, str]) -> None:
    if isinstance(model.vocab, dict):
        raw["vocab"] = {names_of.get(token, token): index for token, index in model.vocab.items()}
    else:
        raw["vocab"] = [[names_of.get(piece, piece), score] for piece, score in model.vocab]
    if raw.get("unk_token") in names_of:
        raw["unk_token"] = names_of[raw["unk_token"]]
    if model.merges:
        pairs = ((left, right, model.merged(left, right)) for left, right in model.pairs())
        raw["merges"] = [list(three[:2]) for three in pairs if not names_of.keys() & set(three)]


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """The library raises plain Exception, and its panics are not even that: the first line as a UserError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{what} ({reason[:300]})") from error
