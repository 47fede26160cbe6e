"""A store's manifest of other types or numbers is damage, and so is a shard that changes while it is used."""

import copy
import json
import multiprocessing
import os
import random

import numpy as np
import pytest
from data_cases import documents, text_folder

from moetrain.data import manifest as manifests
from moetrain.data import prepare, shards
from moetrain.data.manifest import read_manifest, write_manifest
from moetrain.data.shards import open_store
from moetrain.data.stream_writer import StreamWriter
from moetrain.errors import UserError

fork = multiprocessing.get_context("fork")

ODD = [None, True, -1, 0, 1, 1.5, 2**63, 10**400, "", "7", "../x", "\ud800", [], {}, [1], {"a": 1}]


@pytest.fixture
def cfg(tmp_path):
    return text_folder(tmp_path, documents(40))


def places(value, path=()):
    """The way to everything inside of a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(content, path, value):
    """A copy with another value, or without it."""
    new = copy.deepcopy(content)
    inside = new
    for key in path[:-1]:
        inside = inside[key]
    if value is KeyError:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return new


def refusal(cfg, corpus):
    """Why it is refused, or None where it is taken, with the same rows."""
    try:
        again = prepare(cfg)
    except UserError as error:
        return str(error)
    assert len(again.train) == len(corpus.train)
    return None


def test_any_other_manifest_is_one_line_or_tells_the_same(cfg):
    corpus = prepare(cfg)
    file = corpus.folder / "manifest.json"
    whole = json.loads(file.read_text())
    draw = random.Random(5)
    refused = 0
    for path in [place for place in places(whole) if place != ("digest",)]:
        for value in draw.sample([KeyError, *ODD], 2):
            mutant = {key: part for key, part in changed(whole, path, value).items() if key != "digest"}
            write_manifest(corpus.folder, mutant)  # signed again: no digest tells
            line = refusal(cfg, corpus)
            assert line is not None or path[0] in ("sources", "exceptions", "domains", "streams")
            assert line is None or (line.startswith("damaged data: ") and "\n" not in line)
            refused += line is not None
            file.write_text(json.dumps(mutant | {"digest": whole["digest"]}))
            if mutant != {key: part for key, part in whole.items() if key != "digest"}:
                with pytest.raises(UserError, match="damaged data: manifest"):
                    prepare(cfg)
    assert refused > 60


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, '{"digest": NaN}', "\0", "\xff", "9" * 5000], ids=range(6)
)
def test_what_is_no_manifest_is_one_line(cfg, content):
    folder = prepare(cfg).folder
    (folder / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"damaged data: manifest\.json: .*delete the folder") as caught:
        prepare(cfg)
    assert "\n" not in str(caught.value)


@pytest.fixture
def store(tmp_path):
    """Three shards of a hundred tokens, two documents."""
    writer = StreamWriter(tmp_path, "s", "<u2", shard_tokens=100)
    writer.add(np.arange(150), 150, 150, 0)
    writer.add(np.arange(150, 300), 150, 150, 1)
    return tmp_path, {"dtype": "<u2", "streams": {"s": writer.close()}, "domains": ["one", "two"]}


def column(kind, *values):
    def spoil(folder, content):
        path = folder / f"s-{kind}.bin"
        path.write_bytes(np.array(values, manifests.COLUMNS[kind]).tobytes())
        entry = content["streams"]["s"]
        entry["files"] = [shards.describe_file(folder / file["name"]) for file in entry["files"]]

    return spoil


def uneven(folder, content):
    tokens = b"".join((folder / f"s-tokens-{i:05d}.bin").read_bytes() for i in range(3))
    for index, (start, stop) in enumerate([(0, 100), (100, 400), (400, 600)]):
        (folder / f"s-tokens-{index:05d}.bin").write_bytes(tokens[start:stop])
    column("ends", 150, 300)(folder, content)


def largest(folder, content):
    content["tokenizer"] = {"fingerprint": "f", "vocab_size": 299}


SPOILED = {
    "ends descend": (column("ends", 300, 300), "documents that end before they begin"),
    "an end below zero": (column("ends", -5, 300), "documents that end before they begin"),
    "ends fall short": (column("ends", 150, 299), "does not end at its 300 tokens"),
    "bytes add up to more": (column("bytes", 150, 151), "has documents of 301 bytes, not 300"),
    "bytes below zero": (column("bytes", -1, 301), "has documents of 300 bytes, not 300"),
    "a domain too many": (column("domains", 0, 2), "has the domain 2 of 2"),
    "shards of unequal sizes": (uneven, "has shards of unequal sizes"),
    "a token too many": (largest, "has the token 299 of 299"),
}


@pytest.mark.parametrize("kind", sorted(SPOILED))
def test_columns_that_do_not_agree_are_damage_though_hashes_do(store, kind):
    folder, content = store
    write_manifest(folder, content)
    assert open_store(folder)[1]["s"].read(95, 205).tolist() == list(range(95, 205))
    spoil, message = SPOILED[kind]
    spoil(folder, content)
    write_manifest(folder, content)
    with pytest.raises(UserError, match=f"damaged data: .*stream s .*{message}") as caught:
        open_store(folder)
    assert f"delete the folder {folder}" in str(caught.value)


@pytest.mark.parametrize("place", [0, 120, 199])
@pytest.mark.parametrize("change", ["overwritten", "overwritten with its time", "cut", "longer"])
def test_a_shard_that_changes_while_it_is_used_is_told(store, change, place):
    folder, content = store
    write_manifest(folder, content)
    stream = open_store(folder)[1]["s"]
    path = folder / "s-tokens-00001.bin"
    before, data = path.stat(), bytearray(path.read_bytes())
    assert stream.read(100, 200).tolist() == list(range(100, 200))
    with path.open("r+b") as file:
        if change == "cut":
            file.truncate(place)
        else:
            file.seek(place if change != "longer" else 200)
            file.write(bytes([data[min(place, 199)] ^ 1]))
    if change == "overwritten with its time":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert stream.read(0, 100).tolist() == list(range(100))  # the other shards are as they were
    with pytest.raises(UserError, match=r"damaged data: .*s-tokens-00001\.bin"):
        stream.read(150, 160)


def test_a_shard_that_is_only_touched_or_removed_stays_in_use(store):
    folder, content = store
    write_manifest(folder, content)
    stream = open_store(folder)[1]["s"]
    for change in (lambda path: os.utime(path), lambda path: path.chmod(0o400), lambda path: path.unlink()):
        for index in range(3):
            change(folder / f"s-tokens-{index:05d}.bin")
        assert stream.read(0, 300).tolist() == list(range(300))


def _read_what_was_cut(folder):
    stream = open_store(folder)[1]["s"]
    for file in folder.glob("*.bin"):
        os.truncate(file, 0)
    try:
        stream.read(0, 300)
    except UserError:
        os._exit(7)


def test_a_cut_shard_is_an_error_and_no_signal(store):
    folder, content = store
    write_manifest(folder, content)
    child = fork.Process(target=_read_what_was_cut, args=(folder,))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 7


def test_a_manifest_is_read_once_and_typed(store):
    folder, content = store
    write_manifest(folder, content)
    manifest = read_manifest(folder)
    assert manifest.streams["s"].tokens == 300
    assert [file.size for file in manifest.files().values()] == [200, 200, 200, 16, 16, 4]
