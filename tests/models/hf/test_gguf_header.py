"""GGUF files that anybody may have made, and every key and scaling of those that are read."""

from __future__ import annotations

import resource
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_cases import HEAD_DIM, their_model, write_gguf
from hf_cases import convert, load_ours, refused
from hf_family import transformers

from moetrain.errors import UserError
from moetrain.models.hf.gguf import GGUFFile
from moetrain.models.hf.gguf_keys import unknown_key
from moetrain.models.hf.gguf_tokenizer import tokenizer_of
from moetrain.models.rope import rope_table
from moetrain.models.rope_options import RopeKind

gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra: hf)")
THETA = 5000.0
Tensors = Sequence[tuple[str, list[int], int, int]]


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def file_of(pairs: list[bytes], tensors: Tensors = (), **claimed: int) -> bytes:
    """A header by hand and 32 bytes of data for each of ``tensors``, (name, widths, kind, offset)."""
    counts = claimed.get("num_tensors", len(tensors)), claimed.get("num_keys", len(pairs))
    head = struct.pack("<4sIQQ", b"GGUF", 3, *counts) + b"".join(pairs)
    for name, widths, kind, start in tensors:
        head += text(name) + struct.pack(f"<I{len(widths)}QIQ", len(widths), *widths, kind, start)
    return head + bytes(-len(head) % 32 + claimed.get("data", 32 * len(tensors)))


LLAMA = pair("general.architecture", 8, text("llama"))
EMBED = ("token_embd.weight", [4, 2], 0, 0)
CRAFTED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it has only 0 bytes"),
    "another magic": (b"GGML" + bytes(40), "does not begin with GGUF"),
    "version 1": (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "its version is 1"),
    "2^60 keys": (file_of([LLAMA], num_keys=2**60), "claims 1152921504606846976 keys"),
    "2^60 tensors": (file_of([LLAMA], num_tensors=2**60), "claims 1152921504606846976 tensors"),
    "more keys than there are": (file_of([LLAMA], num_keys=9), "no intact GGUF file"),
    "a text beyond the file": (
        file_of([pair("general.name", 8, struct.pack("<Q", 2**60))]),
        "bytes of general.name",
    ),
    "a key of 2^63 letters": (file_of([struct.pack("<Q", 2**63)]), "bytes of a key"),
    "no UTF-8": (file_of([pair("general.name", 8, text(b"\xc7\xff"))]), "general.name is no UTF-8 text"),
    "a key that is no UTF-8": (file_of([text(b"\xff")], num_keys=1), "a key is no UTF-8 text"),
    "a key of two lines": (file_of([pair("a\nb", 4, bytes(4))]), "a key is 'a\\nb', which is no name"),
    "an array of 2^60": (file_of([pair("a", 9, array(4, 2**60))]), "claims 1152921504606846976 values of a"),
    "an array beyond the file": (file_of([pair("a", 9, array(4, 10**6))]), "no intact GGUF file"),
    "an array of empty texts": (file_of([pair("a", 9, array(8, 10**6))]), "no intact GGUF file"),
    "an array of arrays": (file_of([pair("a", 9, array(9, 1, array(9, 1)))]), "an array of type 9"),
    "a type of no value": (file_of([pair("a", 13, b"")]), "a is of type 13"),
    "a key twice": (file_of([LLAMA, LLAMA]), "the key general.architecture is there twice"),
    "a tensor twice": (file_of([LLAMA], [EMBED, (*EMBED[:3], 32)]), "a tensor is there twice"),
    "an alignment of 3": (
        file_of([pair("general.alignment", 4, struct.pack("<I", 3))]),
        "general.alignment=3 is no power of two",
    ),
    "tensors that overlap": (file_of([LLAMA], [EMBED, ("b", [8], 0, 0)]), "b begins at 160, not at"),
    "a tensor beyond the file": (file_of([LLAMA], [("a", [9], 0, 0)]), "and the file has 160 bytes"),
    "a tensor that is too large": (file_of([LLAMA], [("a", [2**40, 2**40], 0, 0)]), "and the file has"),
    "a tensor out of line": (file_of([LLAMA], [("a", [8], 0, 4)]), "a begins at 132, not at 128"),
    "a gap": (file_of([LLAMA], [EMBED, ("b", [8], 0, 64)]), "b begins at 224, not at 192: token_embd.weight"),
    "data left over": (file_of([LLAMA], [EMBED], data=64), "32 bytes follow after its last tensor"),
    "a tensor of no numbers": (file_of([LLAMA], [("a", [0, 2**60], 0, 0)]), "not a whole number of blocks"),
    "half a block": (file_of([LLAMA], [("a", [33], 8, 0)]), "not a whole number of blocks of 32"),
    "five dimensions": (file_of([LLAMA], [("a", [1] * 5, 0, 0)]), "has 5 dimensions"),
    "an unknown quantisation": (file_of([LLAMA], [("a", [8], 999, 0)]), "is of quantisation 999"),
    "no embedding": (file_of([LLAMA]), "token_embd.weight is missing"),
    "no architecture": (file_of([]), "architecture None is not supported"),
    "another type": (file_of([LLAMA, pair("general.type", 8, text("adapter"))]), "general.type='adapter'"),
    "an unknown key": (
        file_of([LLAMA, pair("llama.turns", 4, struct.pack("<I", 3))]),
        "llama.turns=3 is not supported: the key is not known here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", list(CRAFTED))
def test_a_crafted_file(what: str, tmp_path: Path) -> None:
    data, words = CRAFTED[what]
    (tmp_path / "a.gguf").write_bytes(data)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UserError) as raised:
        GGUFFile(tmp_path / "a.gguf")
    assert words in str(raised.value)
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_header_is_read_as_the_package_reads_it(tmp_path: Path) -> None:
    """Every value of the metadata, and the place of every tensor."""
    file = write_gguf(tmp_path / "a.gguf", dict(their_model().named_parameters()), "Q8_0")
    theirs = gguf.GGUFReader(file)
    ours = GGUFFile(file)
    expected = {key: f.contents() for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == expected
    places = {t.name: (t.data_offset, t.n_bytes, int(t.tensor_type)) for t in theirs.tensors}
    assert {t.name: (t.start, t.nbytes, t.kind) for t in ours._stored.values()} == places


Metadata = dict[str, Any]
WORDS: Metadata = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<|eos|>"],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.eos_token_id": 3,
}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("merges", ["a q"], "its merges do not fit its tokens"),
        ("merges", ["ab"], "its merges do not fit its tokens"),
        ("merges", [1], "tokenizer.ggml.merges is no list of texts"),
        ("tokens", "abc", "tokenizer.ggml.tokens is no list of texts"),
        ("tokens", ["a", "a", "ab", "b"], "1 of its 4 tokens are there twice"),
        ("token_type", [1], "4 tokens, but the types of 1"),
        ("token_type", 1, "tokenizer.ggml.token_type is no list of numbers"),
        ("token_type", ["1", "1", "1", "3"], "tokenizer.ggml.token_type is no list of numbers"),
        ("eos_token_id", 9, "none of its 4 tokens"),
        ("eos_token_id", 2.0, "none of its 4 tokens"),
        ("eos_token_id", None, "tokenizer.ggml.eos_token_id is missing"),
        ("pre", ["smollm"], "is not known"),
    ],
)  # fmt: skip
def test_a_crafted_tokenizer(key: str, value: Any, words: str) -> None:
    assert tokenizer_of(WORDS, Path("a.gguf"))[0].encode("ab").ids == [2]
    with pytest.raises(UserError) as raised:
        tokenizer_of(WORDS | {f"tokenizer.ggml.{key}": value}, Path("a.gguf"))
    assert words in str(raised.value)
    assert "tokenizer=/path/to/tokenizer.json" in str(raised.value) or "twice" in words


def test_every_key_of_the_specification_is_decided() -> None:
    """Those of single models beside the architecture, as the package lists them: described or refused."""
    for group in (gguf.Keys.General, gguf.Keys.Tokenizer, gguf.Keys.Split):
        for name, key in vars(group).items():
            if name.isupper() or name.startswith("LLM_"):
                found = unknown_key({key.format(id=0, name="x"): 0})
                refused_here = ("TYPE", "ADD_PREFIX", "REMOVE_EXTRA_WS", "PRECOMPILED_CHARSMAP", "RWKV")
                assert found is None or name in refused_here, key


def with_keys(tmp_path: Path, weights: dict[str, Any], write: Callable[[Any], None]) -> Path:
    """The file of ``weights``, to which ``write`` adds keys and tensors."""
    first = write_gguf(tmp_path / "first.gguf", weights, "F32")
    source, writer = gguf.GGUFReader(first), gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key, field in source.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], inner)
    write(writer)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first.unlink()
    return tmp_path / "model.gguf"


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({}, 1.0),
        ({"rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 4.0}, 4.0),
        ({"rope.scaling.factor": 2.0, "rope.scale_linear": 4.0}, 2.0),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1.0),
        ({"rope.scaling.factor": 0.0}, 1.0),
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_linear_scale(keys: dict[str, Any], factor: float, tmp_path: Path) -> None:
    """The logits of transformers' model under the same linear scaling."""
    theirs = their_model()

    def write(writer: Any) -> None:
        for key, value in keys.items():
            add = writer.add_string if isinstance(value, str) else writer.add_float32
            add(f"llama.{key}", value)

    file = with_keys(tmp_path, dict(theirs.named_parameters()), write)
    spec, ours = load_ours(convert(file, tmp_path / "ours"))
    assert spec.model.rope_scaling.factor == factor
    config = theirs.config
    config.rope_parameters = {"rope_type": "linear", "factor": factor, "rope_theta": THETA}
    scaled = transformers.LlamaForCausalLM(config)
    scaled.load_state_dict(theirs.state_dict())
    ids_BS = torch.arange(226).view(2, 113) % 257
    expected, found = scaled(ids_BS).logits, ours.logits(ours(ids_BS).hidden_BSD)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert factor == 1 or not torch.allclose(found, theirs(ids_BS).logits, rtol=0, atol=1e-3)


def divisors(config: Any) -> np.ndarray[Any, Any]:
    """Unscaled frequencies by scaled ones: what llama.cpp's converter writes for Llama 3.1."""
    scaled = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    plain = 1.0 / THETA ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    return (plain / scaled).numpy()


@pytest.mark.parametrize(
    ("factor", "original", "stated"),
    [(8.0, 8192, False), (32.0, 8192, False), (8.0, 96, False), (3.5, 60, True)],
)
@torch.no_grad()
def test_the_scaling_of_llama_3(factor: float, original: int, stated: bool, tmp_path: Path) -> None:
    theirs = their_model()
    config = theirs.config
    config.rope_parameters = {
        "rope_type": "llama3", "rope_theta": THETA, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": original,
    }  # fmt: skip
    scaled = transformers.LlamaForCausalLM(config)
    scaled.load_state_dict(theirs.state_dict())

    def write(writer: Any) -> None:
        if stated:
            writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_tensor("rope_freqs.weight", divisors(config).astype(np.float32))

    file = with_keys(tmp_path, dict(theirs.named_parameters()), write)
    spec, ours = load_ours(convert(file, tmp_path / "ours"))
    assert spec.model.rope_scaling.kind is RopeKind.llama3
    positions = torch.arange(900)[None]
    m = spec.model
    found = rope_table(positions, HEAD_DIM, m.rope_theta, torch.float64, m.rope_scaling)
    angles = positions[0, :, None] * (1 / THETA ** (torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM))
    angles = angles / torch.from_numpy(divisors(config)).double()
    torch.testing.assert_close(found.sin_BS1h[0, :, 0], angles.sin(), rtol=0, atol=1e-3)
    ids_BS = torch.arange(226).view(2, 113) % 257
    logits_BSV = ours.logits(ours(ids_BS).hidden_BSD)
    torch.testing.assert_close(logits_BSV, scaled(ids_BS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.linspace(1, 2, HEAD_DIM // 2), "is not Llama 3.1's scaling for any factor"),
        (np.ones(HEAD_DIM), "rope_freqs.weight is [16], not [8]"),
        (np.full(HEAD_DIM // 2, np.nan), "below 1 or not finite"),
    ],
)  # fmt: skip
def test_divisors_of_another_scaling(
    values: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", values.astype(np.float32))

    file = with_keys(tmp_path, dict(their_model().named_parameters()), write)
    assert words in refused(capsys, "convert", f"source={file}", f"target={tmp_path}/new")
