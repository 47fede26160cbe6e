"""Model folders that anybody may have made: one line, soon, in little memory; and no link leaks a file."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import CASES, convert, export, refused, sources, write_theirs, write_tokenizer
from hf_family import transformers
from hf_remote_cases import CASES as SPECS

from moetrain.config.stored import read_spec
from moetrain.data import load_tokenizer
from moetrain.errors import UserError
from moetrain.models.hf import FAMILIES
from moetrain.models.hf.family import read_model
from moetrain.models.hf.source import SafetensorsFolder, open_source

__all__ = ["sources"]  # a fixture
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
DEEP = "[" * 100_000 + "]" * 100_000
SECRET = "no line of this may go anywhere"
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def header(tensors: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return edit


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


def pipe(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return edit


def lists(file: str) -> Callable[[Path], None]:
    return write(INDEX, json.dumps({"weight_map": {"a": file}}))


CRAFTED: dict[str, tuple[Callable[[Path], None], str]] = {
    "2^63 layers": (write_config(num_hidden_layers=2**63 - 1), "but the files hold 3 layer(s)"),
    "a layer too many": (write_config(num_hidden_layers=4), "num_hidden_layers=4, but the files hold 3"),
    "2^31 experts": (write_config(num_local_experts=2**31 - 1), "num_experts=2147483647 must be 16777216 or"),
    "2^24 experts": (write_config(num_local_experts=2**24), "num_experts=16777216 in 3 layers"),
    "a huge width": (write_config(hidden_size=2**31 - 1), "not [2147483647, 84]"),
    "heads of no width": (write_config(num_attention_heads=0), "model.num_heads=0 must be 1 or more"),
    "a deep config": (write("config.json", '{"a":' + DEEP + "}"), "recursion limit"),
    "a config of 5 MB": (write("config.json", " " * 5_000_000 + "{}"), "has 5000002 bytes"),
    "a config that is a pipe": (pipe("config.json"), "not a regular file"),
    "weights that are a pipe": (pipe(WEIGHTS), f"holds {WEIGHTS}, which is not a regular file"),
    "an index of a pipe's name": (lists("x" * 5000), "String should have at most 1000"),
    "a long name": (lists("x" * 900), "files are not there"),
    "an absolute name": (lists("/etc/passwd"), "not a file beside it"),
    "a name that climbs": (lists("a/../../b"), "not a file beside it"),
    "a name with NUL": (lists("a\0b"), "not a file beside it"),
    "a name that is a number": (write(INDEX, '{"weight_map": {"a": 3}}'), "has no weight_map"),
    "a deep index": (write(INDEX, DEEP), "recursion limit"),
    "a header beyond the file": (write(WEIGHTS, header({}, length=10**6)), "no intact safetensors"),
    "a header of 2^60 bytes": (write(WEIGHTS, header({}, length=2**60)), "claims 1152921504606846976"),
    "tensors that overlap": (
        write(WEIGHTS, header({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12))),
        "no intact safetensors",
    ),
    "a hole": (
        write(WEIGHTS, header({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20))),
        "no intact safetensors",
    ),
    "a tensor of no numbers": (
        write(WEIGHTS, header({"a": {**F32, "shape": [2**62, 0], "data_offsets": [0, 0]}})),
        "it holds no number",
    ),
    "a name of two lines": (write(WEIGHTS, header({"a\nb": F32}, bytes(8))), "is no name of a tensor"),
    "experts of no width": (write_config(intermediate_size=0), "config.json"),
    "a negative scale": (write_config(initializer_range=-1.0), "init_std=-1.0 must be 0 or more"),
    "an adapter": (write("adapter_config.json", "{}"), "changes to another model"),
}


@pytest.mark.parametrize("what", list(CRAFTED))
def test_a_crafted_folder(what: str, sources: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "crafted"
    shutil.copytree(sources["single"], folder)
    edit, words = CRAFTED[what]
    edit(folder)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UserError) as raised:
        open_source(SafetensorsFolder(folder))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_layers_are_bounded_before_a_config_is_composed(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "crafted"
    shutil.copytree(sources["single"], folder)
    assert read_spec(folder).model.num_layers == 3
    write_config(num_hidden_layers=2**40)(folder)
    with pytest.raises(UserError, match="but the files hold 3"):
        read_spec(folder)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"qk_norm": []}, "qk_norm=[]"),
        ({"activation": {}}, "activation={}"),
        ({"router": 7}, "router=7 is not among"),
        ({"router": {"name": []}}, "is not among"),
        ({"router": {"name": "topk", "group": "${oc.env:HOME}"}}, "is no plain name"),
        ({"router": {"name": "topk", "group": ["a b"]}}, "is no plain name"),
        ({"router": {"name": "topk", "jitter": "1"}}, "router: jitter: Input should be a valid number"),
        ({"router": {"name": "topk", "top_k": 2.5}}, "top_k"),
        ({"router": {"name": "topk", "score": "max"}}, "score"),
        ({"router": {"name": "topk", "turns": 2}}, "topk has no option turns"),
        ({"routing": {"rule": "relu"}}, "routing="),
        ({"auto_map": {"AutoConfig": "other.Config"}}, "auto_map="),
    ],
)  # fmt: skip
def test_a_crafted_config_of_our_own_family(values: dict[str, Any], words: str) -> None:
    written = FAMILIES["moetrain"].config(SPECS["topk"])
    assert read_model(written, "config.json")[1].router.name == "topk"
    with pytest.raises(UserError) as raised:
        read_model(written | values, "config.json")
    assert words in str(raised.value)


def put_link(folder: Path, name: str, target: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer_config.json", "merges.txt", "chat_template.jinja"])
def test_a_link_that_leaves_the_folder(
    name: str, sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither converting nor exporting takes along what it points at; the model is whole all the same."""
    folder, secret = tmp_path / "source", tmp_path / "secret"
    shutil.copytree(sources["tied"], folder)
    secret.write_text(json.dumps({"eos_token": "<|endoftext|>", "key": SECRET}))
    put_link(folder, name, secret)
    (folder / "NOTICE").write_text("goes along")
    ours = convert(folder, tmp_path / "ours")
    assert f"not copied from {folder}: {name}" in capsys.readouterr().err
    outs = [export(ours, tmp_path / "out"), export(folder, tmp_path / "straight")]
    for file in (file for made in (ours, *outs) for file in made.rglob("*") if file.is_file()):
        assert not file.is_symlink()
        assert SECRET.encode() not in file.read_bytes(), file
    for out in outs:
        assert (out / "NOTICE").read_text() == "goes along"
        assert load_tokenizer(out).vocab_size == load_tokenizer(folder).vocab_size
        transformers.AutoTokenizer.from_pretrained(out)


def test_links_of_a_run_folder(sources: dict[str, Path], tmp_path: Path) -> None:
    """``hf`` itself and what is in it: a run folder may have been downloaded, too."""
    ours = convert(sources["tied"], tmp_path / "ours")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "NOTICE").write_text(SECRET)
    put_link(ours / "hf", "NOTICE", elsewhere / "NOTICE")
    assert not (export(ours, tmp_path / "one") / "NOTICE").exists()
    shutil.rmtree(ours / "hf")
    (ours / "hf").symlink_to(elsewhere)
    assert not (export(ours, tmp_path / "two") / "NOTICE").exists()


def test_the_hubs_cache_is_read(sources: dict[str, Path], tmp_path: Path) -> None:
    """Its files are links to the blobs of the same model."""
    model = tmp_path / "hub" / "models--an--example"
    snapshot = model / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, file in enumerate(sorted(sources["sharded"].iterdir())):
        shutil.copy(file, model / "blobs" / f"blob{number}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"blob{number}"))
    ours = convert(snapshot, tmp_path / "ours")
    carried = {file.name for file in (ours / "hf").iterdir()}
    assert carried >= {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}


def test_a_carried_file_that_is_no_file(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(sources["tied"], folder)
    os.mkfifo(folder / "LICENSE")
    put_link(folder, "NOTICE", folder / "NOTICE")
    (folder / "merges.txt").mkdir()
    ours = convert(folder, tmp_path / "ours")
    assert {file.name for file in (ours / "hf").iterdir()} == {"config.json", "generation_config.json"}


def test_an_export_names_no_path(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(sources["tied"], folder)
    write_config(_name_or_path="/home/somebody/model")(folder)
    out = export(convert(folder, tmp_path / "ours"), tmp_path / "out")
    texts = [file.read_text() for file in out.iterdir() if file.suffix in (".json", ".jinja")]
    assert [text for text in texts if str(tmp_path) in text or "somebody" in text] == []
    manifest = json.loads((out / "moetrain_export.json").read_text())
    assert manifest["checkpoint"] == "ours/step_00000000"


def test_weights_alone_are_enough(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "source"
    shutil.copytree(sources["tied"], folder, ignore=shutil.ignore_patterns("tokenizer*"))
    for command in (f"convert source={folder}", f"export checkpoint={folder}"):
        line = refused(capsys, *command.split(), f"target={tmp_path}/new")
        assert "the weights alone are enough" in line
        assert "tokenizer=FILE" in line
    write_tokenizer(tmp_path / "words")
    ours = convert(folder, tmp_path / "ours", f"tokenizer={tmp_path}/words/tokenizer.json")
    assert load_tokenizer(ours / "tokenizer").vocab_size == 11


def test_an_added_token_without_an_embedding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As fine-tuning adds a padding token; one that text can yield is refused."""
    theirs = CASES["llama_tied"].their_model(torch.float32)
    folder = write_theirs(theirs, tmp_path / "source")
    write_tokenizer(folder, 97)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder).vocab_size == 98
    own = load_tokenizer(convert(folder, tmp_path / "ours") / "tokenizer")
    assert (own.vocab_size, own.eos_id) == (97, 96)
    assert own.encode("w3") == load_tokenizer(folder).encode("w3") == [3]
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(folder)
    line = refused(capsys, "convert", f"source={folder}", f"target={tmp_path}/new")
    assert "99 tokens, but the model's embedding only 97" in line
    assert "not all added special tokens" in line
