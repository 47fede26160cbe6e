"""The store on disk: damage is named, concurrent and dying processes leave it whole, disks may be full."""

import multiprocessing
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from data_cases import documents, text_folder

from moetrain.cache_folder import cache_root
from moetrain.data import prepare, shards
from moetrain.data.cache import build_once
from moetrain.data.manifest import write_manifest
from moetrain.data.options import TokenizerConfig
from moetrain.data.shards import open_store
from moetrain.data.stream_writer import StreamWriter
from moetrain.errors import UserError

fork = multiprocessing.get_context("fork")


@pytest.fixture
def cfg(tmp_path):
    return text_folder(tmp_path, documents(40))


@pytest.mark.parametrize("file", ["000-train-tokens-00000.bin", "000-val-ends.bin", "000-train-domains.bin"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
@pytest.mark.parametrize("full", [True, False])
def test_damaged_shards_are_named(cfg, file, damage, full, monkeypatch):
    folder = prepare(cfg).folder
    path = folder / file
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content[:-2] if damage == "cut" else content)
    if damage == "remove":
        path.unlink()
    if not full:
        monkeypatch.setattr(shards, "FULL_CHECK_BYTES", 0)
    with pytest.raises(UserError) as caught:
        prepare(cfg)
    assert str(path) in str(caught.value)
    assert f"delete the folder {folder}" in str(caught.value)
    expected = {"cut": "bytes, not", "flip": "recorded hash", "remove": "cannot be read"}
    assert expected[damage] in str(caught.value)
    shutil.rmtree(folder)
    prepare(cfg)


@pytest.mark.parametrize("content", ["", "{}", "[]", None])
def test_a_damaged_manifest_is_named(cfg, content):
    folder = prepare(cfg).folder
    manifest = folder / "manifest.json"
    if content is None:
        manifest.write_text(manifest.read_text().replace('"documents": ', '"documents": 1'))
    else:
        manifest.write_text(content)
    with pytest.raises(UserError, match=r"damaged data: manifest\.json"):
        prepare(cfg)


def test_a_changed_tokenizer_is_damage_too(cfg):
    cfg = replace(cfg, tokenizer=TokenizerConfig(vocab_size=270))
    folder = prepare(cfg).folder
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    (folder / "tokenizer/tokenizer_config.json").write_text('{"tokenizer_class": "moetrain.bytes"}')
    with pytest.raises(UserError, match="not the tokenizer that it was made with"):
        prepare(cfg)


def test_large_files_are_checked_at_both_ends_and_in_the_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FULL_CHECK_BYTES", 0)
    monkeypatch.setattr(shards, "_BLOCK", 64)
    writer = StreamWriter(tmp_path, "s", "<u4")
    writer.add(np.arange(500), 1, 1, 0)
    write_manifest(tmp_path, {"dtype": "<u4", "streams": {"s": writer.close()}})
    path = tmp_path / "s-tokens-00000.bin"
    content = path.read_bytes()
    for place in (0, 1000, 1999):
        path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        with pytest.raises(UserError, match="does not match its recorded hash"):
            open_store(tmp_path)
    path.write_bytes(content)
    assert open_store(tmp_path)[1]["s"].read(490, 600).tolist() == list(range(490, 500))


def test_wide_ids_are_kept(tmp_path):
    writer = StreamWriter(tmp_path, "s", "<u4", shard_tokens=3)
    ids = [0, 65_535, 65_536, 4_000_000_000, 7, 1, 2]
    writer.add(np.array(ids[:4]), 1, 1, 0)
    writer.add(np.array(ids[4:]), 1, 1, 0)
    write_manifest(tmp_path, {"dtype": "<u4", "streams": {"s": writer.close()}})
    stream = open_store(tmp_path)[1]["s"]
    assert [len(shard) for shard in stream.shards] == [3, 3, 1]
    assert stream.read(1, 7).tolist() == ids[1:]
    assert stream.ends_M.tolist() == [4, 7]


def _prepare_in_child(cfg, start, made):
    import moetrain.data.corpus as module

    original = module.write_corpus

    def counting(*args):
        made.put(os.getpid())
        original(*args)

    module.write_corpus = counting
    start.wait()
    made.put(prepare(cfg).fingerprint)


def test_processes_that_prepare_at_once_make_it_once(tmp_path):
    cfg = text_folder(tmp_path, documents(400))
    start, made = fork.Barrier(3), fork.Queue()
    children = [fork.Process(target=_prepare_in_child, args=(cfg, start, made)) for _ in range(3)]
    for child in children:
        child.start()
    answers = [made.get(timeout=120) for _ in range(4)]  # three fingerprints and one process that worked
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    assert made.empty()
    assert len({answer for answer in answers if isinstance(answer, str)}) == 1
    assert prepare(cfg).fingerprint in answers


def _die_while_building(folder):
    def build(temporary):
        (temporary / "half").write_text("written")
        os._exit(9)

    build_once(folder, build)


def test_a_dead_process_leaves_no_lock_and_its_rest_is_removed(tmp_path):
    folder = tmp_path / "thing"
    child = fork.Process(target=_die_while_building, args=(folder,))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 9
    assert list(tmp_path.glob("thing.tmp-*"))
    build_once(folder, lambda temporary: (temporary / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not list(tmp_path.glob("thing.tmp-*"))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    def build(temporary):
        with open("/dev/full", "w") as out:  # the kernel's own full device
            out.write("x")

    with pytest.raises(UserError, match=r"cannot write .*thing: No space left on device; free some space or"):
        build_once(tmp_path / "thing", build)
    assert [path.name for path in tmp_path.iterdir()] == ["thing.lock"]


def test_a_cache_that_cannot_be_written_is_named(cfg, tmp_path):
    (tmp_path / "occupied").touch()
    with pytest.raises(UserError, match=r"cannot write .*occupied.*data\.cache_dir"):
        prepare(replace(cfg, cache_dir=str(tmp_path / "occupied")))


def test_a_failed_preparation_leaves_nothing_half_written(tmp_path):
    cfg = text_folder(tmp_path, documents(5))
    (tmp_path / "files/bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        prepare(cfg)
    assert [path.suffix for path in (tmp_path / "cache/corpora").iterdir()] == [".lock"]


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / "moetrain"
    assert cache_root(str(tmp_path / "here")) == tmp_path / "here"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root(None) == tmp_path / "home/.cache/moetrain"
    assert cache_root("~/x") == tmp_path / "home/x"
