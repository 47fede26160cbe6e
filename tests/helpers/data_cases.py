"""Text for the tests of data: files, documents on a wanted side, and streams of given ids.

M documents.
"""

import json

import numpy as np

from moetrain.data.documents import content_key
from moetrain.data.heldout import HeldOut
from moetrain.data.manifest import write_manifest
from moetrain.data.options import LocalData, TokenizerConfig, TokenizerKind
from moetrain.data.packing import PackedSplit, Packing
from moetrain.data.shards import open_store
from moetrain.data.stream_writer import StreamWriter

BYTES = TokenizerConfig(kind=TokenizerKind.bytes)
EOS = 9
TOKEN_BYTES = np.array([1, 2, 3, 1, 4, 1, 2, 5, 1, 0])  # of ids 0 to 9


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def texts(source):
    return [document.text for document in source.documents()]


def documents(count, salt=""):
    return [f"{salt}{i}: " + "lorem ipsum dolor " * (1 + i % 3) + "é" * (i % 2) for i in range(count)]


def with_key(text, held):
    """The text with the first number after it that puts it on the wanted side at val_fraction 0.02."""
    numbered = (f"{text} {number}" for number in range(10_000))
    return next(one for one in numbered if HeldOut(0.02)(content_key(one.encode())) is held)


def text_folder(tmp_path, texts, name="files"):
    folder = tmp_path / name
    folder.mkdir()
    for index, text in enumerate(texts):
        (folder / f"{index:03d}.txt").write_text(text)
    return LocalData(path=str(folder), seq_len=8, tokenizer=BYTES, cache_dir=str(tmp_path / "cache"))


def stored_documents(corpus, side):
    """The texts of one side, read back from the shards."""
    _, streams = open_store(corpus.folder)
    found = []
    for name, stream in streams.items():
        if name.endswith(side):
            ids = stream.read(0, stream.num_tokens)
            ends = stream.ends_M
            assert (ids[ends - 1] == corpus.tokenizer.eos_id).all()
            found += [corpus.tokenizer.decode(piece.tolist()) for piece in np.split(ids, ends)[:-1]]
    return found


def make_stream(folder, documents, domains=None, shard_tokens=1000):
    """A one-stream store of documents given as lists of ids without their eos."""
    writer = StreamWriter(folder, "s", "<u2", shard_tokens)
    for index, ids in enumerate(documents):
        counted = int(TOKEN_BYTES[ids].sum())
        domain = domains[index] if domains else 0
        writer.add(np.array([*ids, EOS]), counted, counted, domain)
    write_manifest(folder, {"dtype": "<u2", "streams": {"s": writer.close()}})
    return open_store(folder)[1]["s"]


def make_split(streams, seq_len, keep=True, reset=True, pad=True):
    packing = Packing(seq_len, EOS, keep_documents=keep, reset_positions=reset, pad_last=pad)
    return PackedSplit(streams, packing, TOKEN_BYTES, "fingerprint")
