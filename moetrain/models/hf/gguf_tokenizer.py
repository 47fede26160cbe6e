"""The byte-level BPE tokenizer that a GGUF file carries, as a ``tokenizers`` tokenizer.

What comes before the merges is only named in the file (``tokenizer.ggml.pre``): the pre-tokenizers below are
those of the models that the names stand for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from moetrain.errors import UserError, quoted

_ADVICE = "give the model's own: tokenizer=/path/to/tokenizer.json"
_CONTROL, _USER_DEFINED = 3, 4
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits: str) -> PreTokenizer:
    pattern = Regex(_CONTRACTIONS + _REST % digits)
    return Sequence([Split(pattern, "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


def _pre_tokenizers() -> dict[str, PreTokenizer]:
    byte_level = ByteLevel(add_prefix_space=False)
    return {
        "gpt-2": byte_level,
        "default": byte_level,
        "smollm": Sequence([Digits(individual_digits=True), byte_level]),
        "llama-bpe": _split(r"\p{N}{1,3}"),
        "qwen2": _split(r"\p{N}"),
    }


def tokenizer_of(metadata: dict[str, Any], path: Path) -> tuple[Tokenizer, str]:
    """The tokenizer and its end-of-text token. Raises UserError for a kind that is not known."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    known = _pre_tokenizers()
    if kind != "gpt2" or not isinstance(pre, str) or pre not in known:
        raise UserError(
            f"{path}: its tokenizer (tokenizer.ggml.model={quoted(kind)}, pre={quoted(pre)}) is not known; "
            f"known: gpt2 with {', '.join(known)}; {_ADVICE}"
        )
    tokens, merges = (_texts(metadata, key, path) for key in ("tokens", "merges"))
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    if type(eos) is not int or not 0 <= eos < len(tokens):
        raise UserError(
            f"{path}: tokenizer.ggml.eos_token_id is missing or none of its {len(tokens)} tokens "
            f"({quoted(eos)}); {_ADVICE}"
        )
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise UserError(f"{path}: {len(tokens) - len(vocab)} of its {len(tokens)} tokens are there twice")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if not isinstance(types, list) or any(type(number) is not int for number in types):
        raise UserError(f"{path}: tokenizer.ggml.token_type is no list of numbers; {_ADVICE}")
    if len(types) != len(tokens):
        raise UserError(f"{path}: {len(tokens)} tokens, but the types of {len(types)}; {_ADVICE}")
    whole_words = pre == "llama-bpe"  # a word that is a token is that token, whatever the merges say
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        tokenizer = Tokenizer(BPE(vocab=vocab, merges=pairs, ignore_merges=whole_words))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: its merges do not fit its tokens ({error}); {_ADVICE}") from None
    tokenizer.pre_tokenizer = known[pre]
    tokenizer.decoder = decoders.ByteLevel()
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, found in zip(tokens, types, strict=True)
            if found == wanted
        ]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    return tokenizer, tokens[eos]


def _texts(metadata: dict[str, Any], key: str, path: Path) -> list[str]:
    found = metadata.get(f"tokenizer.ggml.{key}")
    if found is None:
        raise UserError(f"{path}: tokenizer.ggml.{key} is missing; {_ADVICE}")
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise UserError(f"{path}: tokenizer.ggml.{key} is no list of texts; {_ADVICE}")
    return found
