"""The JSON of a checkpoint: exact round trips, and refusal of everything that is not exactly it."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from moetrain.checkpoint.format import FormatError, decode_metadata, encode_metadata
from moetrain.checkpoint.manifest import FileRecord, Manifest, decode_manifest, encode_manifest

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]


def _metadata(blocks: dict[str, tuple[torch.dtype, list[int], int]]) -> Metadata:
    """Tensors by name: dtype, shape, and over how many ranks the first dimension is cut."""
    entries, storage = {}, {}
    for name, (dtype, shape, ranks) in blocks.items():
        chunks = []
        rows = math.ceil(shape[0] / ranks) if shape else 0
        for rank in range(ranks if shape and shape[0] else 1):
            start = min(rank * rows, shape[0]) if shape else 0
            sizes = [min(rows, shape[0] - start), *shape[1:]] if shape else []
            offsets = [start, *[0] * (len(shape) - 1)] if shape else []
            index = MetadataIndex(name, offsets)
            if index in storage:
                continue
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            storage[index] = _StorageInfo(f"__{rank}_0.distcp", 7 * rank, 11 + rank)
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks)
    return Metadata(entries, storage_data=storage)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 7), max_size=3), st.integers(1, 5)),
        max_size=4,
    )
)
def test_metadata_survives_the_round_trip(blocks):
    metadata = _metadata(blocks)
    again = decode_metadata(encode_metadata(metadata))
    assert again.storage_data == metadata.storage_data
    assert again.state_dict_metadata.keys() == metadata.state_dict_metadata.keys()
    for name, entry in metadata.state_dict_metadata.items():
        assert again.state_dict_metadata[name].size == entry.size
        assert again.state_dict_metadata[name].chunks == entry.chunks
        assert again.state_dict_metadata[name].properties.dtype == entry.properties.dtype


def _changed(change) -> str:
    document = json.loads(encode_metadata(_metadata({"w": (torch.float32, [5, 3], 2)})))
    change(document)
    return json.dumps(document)


def _chunk(document):
    return document["tensors"]["w"]["chunks"][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=1), "version 1; this moetrain reads"),
        (lambda d: d.update(format="other"), "'other' version 2"),
        (lambda d: d.update(more=1), "metadata must have exactly the keys"),
        (lambda d: d.pop("tensors"), "metadata must have exactly the keys"),
        (lambda d: d.update(tensors=[]), "tensors is not an object"),
        (lambda d: d["tensors"]["w"].update(dtype="float31"), "w has the unknown dtype 'float31'"),
        (lambda d: d["tensors"]["w"].update(dtype="torch.float32"), "unknown dtype"),
        (lambda d: d["tensors"]["w"].update(dtype=["float32"]), "unknown dtype"),
        (lambda d: d["tensors"]["w"].update(shape=[5, -3]), "-3 is not a size"),
        (lambda d: d["tensors"]["w"].update(shape=[5, True]), "True is not a size"),
        (lambda d: d["tensors"]["w"].update(shape=[5, 3.0]), "3.0 is not a size"),
        (lambda d: d["tensors"]["w"].update(shape="53"), "'53' is not a shape"),
        (lambda d: d["tensors"]["w"].update(chunks={}), "chunks is not a list"),
        (lambda d: d["tensors"]["w"]["chunks"].pop(), "do not fill its shape"),
        (lambda d: d["tensors"]["w"]["chunks"].append(_chunk(d)), r"two blocks at \[3, 0\]"),
        (lambda d: _chunk(d).update(offsets=[4, 0]), "reaches beyond its shape"),
        (lambda d: _chunk(d).update(offsets=[3]), "another number of dimensions"),
        (lambda d: _chunk(d).update(file="../../etc/passwd"), "not a file name inside"),
        (lambda d: _chunk(d).update(file=".metadata"), "not a file name inside"),
        (lambda d: _chunk(d).update(position=-1), "-1 is not a size"),
        (lambda d: _chunk(d).pop("length"), "a block of w must have exactly the keys"),
    ],
)
def test_metadata_that_was_changed_is_refused(change, message):
    decode_metadata(_changed(lambda document: None))
    with pytest.raises(FormatError, match=message):
        decode_metadata(_changed(change))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", "\x00"])
def test_text_that_is_no_metadata_is_refused(text):
    with pytest.raises(FormatError):
        decode_metadata(text)


def test_only_dense_tensors_can_be_described():
    with pytest.raises(FormatError, match="b is not a dense tensor"):
        encode_metadata(Metadata({"b": BytesStorageMetadata()}, storage_data={}))
    with pytest.raises(FormatError, match="dtype uint16 cannot be stored"):
        encode_metadata(_metadata({"w": (torch.uint16, [3], 1)}))


MANIFEST = Manifest(100, (FileRecord("__0_0.distcp", 1234, "0f" * 32), FileRecord("extra.json", 2, None)))


def test_manifest_survives_the_round_trip():
    assert decode_manifest(encode_manifest(MANIFEST)) == MANIFEST


def test_every_flipped_bit_of_a_manifest_is_noticed():
    data = encode_manifest(MANIFEST)
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(FormatError):
                decode_manifest(bytes(flipped))


def test_every_truncated_manifest_is_noticed():
    data = encode_manifest(MANIFEST)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            decode_manifest(data[:length])


def test_a_manifest_cannot_name_a_file_elsewhere():
    with pytest.raises(FormatError, match="not a file name"):
        decode_manifest(encode_manifest(Manifest(1, (FileRecord("../x", 1, None),))))
