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

from moetrain.errors import UserError

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
    if kind != "gpt2" or pre not in known:
        raise UserError(
            f"{path}: its tokenizer (tokenizer.ggml.model={kind!r}, pre={pre!r}) is not known; known: gpt2 "
            f"with {', '.join(known)}. Give the model's own: tokenizer=/path/to/tokenizer.json"
        )
    for key in ("tokens", "merges", "eos_token_id"):
        if metadata.get(f"tokenizer.ggml.{key}") is None:
            raise UserError(
                f"{path}: tokenizer.ggml.{key} is missing; give tokenizer=/path/to/tokenizer.json"
            )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise UserError(f"{path}: {len(tokens) - len(vocab)} of its {len(tokens)} tokens are there twice")
    whole_words = pre == "llama-bpe"  # a word that is a token is that token, whatever the merges say
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=whole_words))
    tokenizer.pre_tokenizer = known[pre]
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, found in zip(tokens, types, strict=True)
            if found == wanted
        ]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    eos = metadata["tokenizer.ggml.eos_token_id"]
    if not 0 <= eos < len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.eos_token_id={eos} is none of its {len(tokens)} tokens")
    return tokenizer, tokens[eos]
