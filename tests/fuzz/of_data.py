"""Targets: the manifest of tokenised data, and tokenizers."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzz.forms import json_file
from fuzz.sign import signed_data
from fuzz.target import Target, Way, command
from moetrain.config.hydra.compose import load_yaml
from moetrain.data import load_tokenizer
from moetrain.data.corpus import _open
from moetrain.data.sources import build_parts

_TEXT = "hello abc  123 \n def \u00e9\U0001f600 <|endoftext|></s>"


def _open_corpus() -> dict[str, Any]:
    """As ``prepare`` opens a store that is there, whose key would hold the inode of the text's first copy."""
    (made,) = Path("cache/corpora").glob("*/manifest.json")
    cfg = load_yaml("run/config.yaml").data
    corpus = _open(made.parent, cfg, build_parts(cfg, Path("cache")), seed=0)
    digest = hashlib.sha256()
    for split in (corpus.train, corpus.val):
        for array in split.rows(np.arange(len(split))):
            digest.update(np.ascontiguousarray(array).tobytes())
    sides = (corpus.train, corpus.val)
    return {
        "rows": digest.hexdigest(),
        "lengths": [(len(split), split.num_tokens, split.num_documents, split.num_bytes) for split in sides],
        "first": [int(corpus.order(np.arange(4))[0]), corpus.tokenizer.fingerprint, corpus.fingerprint],
        "scale": corpus.val.byte_scale,
        "domains": corpus.domains,
    }


def _same_corpus(good: Any, found: Any) -> str | None:
    """Equal, but for the names of domains and a count of bytes that nothing else tells."""
    for key in ("rows", "lengths", "first"):
        if found[key] != good[key]:
            return f"differs: {key}: {str(found[key])[:80]}"
    domains = found["domains"]
    if (
        not isinstance(domains, tuple)
        or not all(isinstance(name, str) for name in domains)
        or len(domains) < len(good["domains"])
    ):
        return f"differs: domains {str(domains)[:80]}"
    scale = found["scale"]
    return None if isinstance(scale, float) and 0 < scale < 1e6 else f"differs: byte_scale {scale}"


def _sign(path: Path, rng: Random) -> str | None:
    if rng.random() < 0.15:
        return None
    signed_data(path.parent)
    return " (signed again)"


def _tokenizer(path: str) -> dict[str, Any]:
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(_TEXT)
    (batched,) = tokenizer.encode_batch([_TEXT])
    sizes = tokenizer.token_bytes()
    tokenizer.save(Path("saved"))
    return {
        "size": tokenizer.vocab_size,
        "eos": tokenizer.eos_id,
        "ids": ids,
        "batched": batched.tolist(),
        "bytes": sizes,
        "text": tokenizer.decode(ids),
        "again": load_tokenizer("saved").fingerprint == tokenizer.fingerprint,
    }


def _usable(good: Any, found: Any) -> str | None:
    """Ids lie in the vocabulary, lengths are lengths, and what was saved is what was loaded."""
    size = found["size"]
    if not 0 < size <= 2**24 or not 0 <= found["eos"] < size:
        return f"differs: eos {found['eos']} of {size} tokens"
    if found["ids"] != found["batched"] or not all(0 <= index < size for index in found["ids"]):
        return f"differs: ids {str(found['ids'])[:60]} of {size}"
    if len(found["bytes"]) != size or (found["bytes"] < 0).any():
        return f"differs: {len(found['bytes'])} lengths for {size} tokens"
    return None if found["again"] else "differs: another tokenizer after saving it"


def _generate() -> str:
    return command(["generate", "checkpoint=run", "prompt=abc", "max_new_tokens=3", "device=cpu"])


def _text(good: str, found: str) -> str | None:
    return None if isinstance(found, str) and found.startswith("abc") else f"differs: {found[:80]!r}"


TARGETS = [
    Target(
        "data_manifest",
        ("run", "cache", "text"),
        ("cache/corpora/*/manifest.json",),
        json_file,
        (Way("train", _open_corpus, _same_corpus),),
        _sign,
        share=2,
    ),
    Target(
        "tokenizer_json",
        ("mixtral", "run"),
        ("mixtral/tokenizer.json", "mixtral/tokenizer_config.json"),
        json_file,
        (
            Way("load", partial(_tokenizer, "mixtral"), _usable),
            Way("file", partial(_tokenizer, "mixtral/tokenizer.json"), _usable),
        ),
        share=2,
    ),
    Target(
        "run_tokenizer",
        ("run",),
        ("run/tokenizer/tokenizer.json", "run/tokenizer/tokenizer_config.json"),
        json_file,
        (Way("generate", _generate, _text),),
    ),
]
