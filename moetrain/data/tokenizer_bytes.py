"""The byte tokenizer as a ``tokenizer.json``, for tools that know no other kind."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from moetrain.data.tokenizer import EOS, ByteTokenizer, JsonTokenizer


def bytes_as_json() -> JsonTokenizer:
    """Byte-level BPE without merges: the ids of :class:`ByteTokenizer`, 256 ends a document."""
    tokenizer = Tokenizer(BPE(vocab={char: byte for byte, char in enumerate(_alphabet())}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    assert tokenizer.token_to_id(EOS) == ByteTokenizer.eos_id
    return JsonTokenizer(tokenizer, EOS)


def _alphabet() -> list[str]:
    """The character that stands for each byte: itself where it is printable in Latin-1, else from 256 up."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
