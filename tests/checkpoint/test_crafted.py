"""Checkpoints that somebody crafted and signed: refused in one line, before any value is taken over."""

import io
import json
import math
import os
import struct
import zipfile

import pytest
import tiny
import torch

from moetrain.checkpoint.blocks import BlockError, check_block
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.format import dtype_name
from moetrain.checkpoint.read import load_checkpoint
from moetrain.checkpoint.stream import StoredTensors
from moetrain.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def saved(tmp_path):
    return Checkpointer(tmp_path / "ck").save(
        3, {"w": torch.arange(24.0).reshape(8, 3), "n": torch.tensor(7)}, {}
    )


def _refused(path, message):
    """Both readers refuse, in one line that names the checkpoint, and change nothing."""
    tensors = {"w": torch.full((8, 3), -1.0), "n": torch.tensor(-1)}
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(path, tensors)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert all((tensor == -1).all() for tensor in tensors.values())
    with pytest.raises(UserError, match=message):
        StoredTensors(path).read("w")


def _chunk(chunk, **values):
    return {**chunk, **values}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda w, c: w.update(chunks=[_chunk(c, sizes=[4, 3]), _chunk(c, offsets=[1, 0], sizes=[4, 3])]),
            "blocks of w do not fill its shape",
            id="overlap_and_hole",
        ),
        pytest.param(
            lambda w, c: w.update(chunks=[_chunk(c, sizes=[4, 3]), _chunk(c, offsets=[4, 0], sizes=[4, 3])]),
            "blocks of w and w share bytes",
            id="one_record_twice",
        ),
        pytest.param(
            lambda w, c: (w.update(shape=[1 << 36, 3]), c.update(sizes=[1 << 36, 3])),
            "has 824633720832 bytes of values, but",
            id="more_rows_than_bytes",
        ),
        pytest.param(
            lambda w, c: (w.update(shape=[10**30, 3]), c.update(sizes=[10**30, 3])),
            "is not a size",
            id="huge_int",
        ),
        pytest.param(
            lambda w, c: (w.update(shape=[1 << 40, 1 << 40]), c.update(sizes=[1 << 40, 1 << 40])),
            "larger than any tensor",
            id="huge_product",
        ),
        pytest.param(
            lambda w, c: (
                w.update(shape=[0, 1 << 61, 8]),
                c.update(sizes=[0, 1 << 61, 8], offsets=[0, 0, 0]),
            ),
            "larger than any tensor",
            id="empty_and_huge",
        ),
        pytest.param(
            lambda w, c: c.update(length=1 << 20), "ends at byte .* of __0_0.distcp, which has", id="beyond"
        ),
        pytest.param(lambda w, c: c.update(position=0, length=0), "but 0 are stored", id="no_bytes"),
        pytest.param(lambda w, c: c.update(file="extra.json"), "ends at byte|share bytes", id="another_file"),
        pytest.param(lambda w, c: c.update(file="other"), "the manifest does not list", id="unlisted_file"),
        pytest.param(
            lambda w, c: c.update(position=c["position"] + 1, length=c["length"] - 1), "torch", id="shifted"
        ),
        pytest.param(
            lambda w, c: w.update(dtype="float64"), "float64.8, 3. in the|holds 96 bytes", id="dtype"
        ),
        pytest.param(
            lambda w, c: (w.update(shape=[4, 3]), c.update(sizes=[4, 3])),
            "holds 96 bytes|is of another",
            id="shape",
        ),
    ],
)
def test_crafted_metadata_is_refused(saved, change, message):
    document = json.loads((saved / "metadata.json").read_text())
    entry = document["tensors"]["w"]
    change(entry, entry["chunks"][0])
    (saved / "metadata.json").write_text(json.dumps(document))
    tiny.sign(saved)
    _refused(saved, message)


def test_deeply_nested_metadata_is_refused(saved):
    text = (saved / "metadata.json").read_text()
    (saved / "metadata.json").write_text(
        text.replace('"format"', '"x": ' + "[" * 10**5 + "]" * 10**5 + ', "format"')
    )
    tiny.sign(saved)
    _refused(saved, "metadata.json: not JSON")


def _block(tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def _repacked(change, method=zipfile.ZIP_STORED, plain_tail=True) -> bytes:
    """The block of eight by three floats with its records changed, and torch's way of ending an archive."""
    source = zipfile.ZipFile(io.BytesIO(_block(torch.zeros(8, 3))))
    records = [(info.filename, source.read(info)) for info in source.infolist()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in change(records):
            archive.writestr(zipfile.ZipInfo(name), data, compress_type=method)
    data = buffer.getvalue()
    if not plain_tail:
        return data
    *_, entries, size, start, _ = struct.unpack("<4s4HIIH", data[-22:])
    wide = struct.pack("<4sQHHII4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, entries, entries, size, start)
    return data[:-22] + wide + struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1) + data[-22:]


def _with(name, data):
    def change(records):
        return [
            (n, data(d) if callable(data) and n.endswith(name) else data if n.endswith(name) else d)
            for n, d in records
        ]

    return change


BLOCKS = [
    pytest.param(lambda: _repacked(_with("byteorder", b"big")), "in another order than little", id="order"),
    pytest.param(lambda: _repacked(list, zipfile.ZIP_DEFLATED), "values are compressed", id="deflated"),
    pytest.param(lambda: _repacked(list, plain_tail=False), "does not end as", id="another_tail"),
    pytest.param(lambda: _repacked(list) + b"\0", "does not end as", id="a_byte_more"),
    pytest.param(lambda: b"", "no archive", id="empty"),
    pytest.param(lambda: b"\0" * 5000, "does not end as", id="zeros"),
    pytest.param(lambda: _repacked(_with("data/0", b"\0" * 97)), "97 bytes of values, not 96", id="longer"),
    pytest.param(lambda: _repacked(_with("data/0", b"")), "0 bytes of values, not 96", id="no_values"),
    pytest.param(
        lambda: _repacked(lambda r: [*r[:-1], ("archive/x", b"1" * 10**5)]), "more than its values", id="more"
    ),
    pytest.param(
        lambda: _repacked(lambda r: [*r, ("archive/DATA.pkl", b"")]), "there twice", id="two_pickles"
    ),
    pytest.param(lambda: _repacked(lambda r: r[1:]), "bytes of values", id="no_pickle"),
    pytest.param(
        lambda: _repacked(_with("data.pkl", b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.")),
        "pickle asks for builtins bytearray",
        id="two_gigabytes_by_pickle",
    ),
    pytest.param(
        lambda: _repacked(_with("data.pkl", b"\x80\x04\x8c\x02os\x8c\x06system\x93.")),
        "asks for STACK_GLOBAL",
        id="stack",
    ),
    pytest.param(
        lambda: _repacked(_with("data.pkl", b"\x80\x02cos")), "pickle is damaged", id="half_a_pickle"
    ),
]


@pytest.mark.parametrize(("make", "message"), BLOCKS)
def test_a_block_that_no_save_writes_is_refused(make, message):
    check_block(io.BytesIO(_repacked(list)), torch.float32, [8, 3])
    with pytest.raises(BlockError, match=message):
        check_block(io.BytesIO(make()), torch.float32, [8, 3])


def test_a_pickle_that_counts_more_values_than_stored(saved):
    data = _with("data.pkl", lambda d: d.replace(b"K\x18t", b"M\xff\x7ft"))
    _replace_block(saved, _repacked(data))
    with pytest.raises(UserError, match=r"of w at \[0, 0\]: its pickle says .* in 131068 bytes"):
        StoredTensors(saved).read("w")


def test_a_deflated_block_is_refused_before_it_inflates(saved):
    _replace_block(saved, _repacked(list, zipfile.ZIP_DEFLATED))
    _refused(saved, r"__0_0.distcp: the block of w at \[0, 0\]: its values are compressed")


def _replace_block(path, block: bytes) -> None:
    document = json.loads((path / "metadata.json").read_text())
    (chunk,) = document["tensors"]["w"]["chunks"]
    file = path / chunk["file"]
    chunk.update(position=file.stat().st_size, length=len(block))
    file.write_bytes(file.read_bytes() + block)
    (path / "metadata.json").write_text(json.dumps(document))
    tiny.sign(path)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float8_e4m3fn, torch.int64),
        *(torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128),
    ],
    ids=dtype_name,
)
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 2)], ids=str)
def test_every_dtype_that_is_written_is_read_again(tmp_path, dtype, shape):
    value = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    tensor = value.T.contiguous().T if len(shape) == 2 else value  # strides of its own
    Checkpointer(tmp_path).save(1, {"w": tensor}, {})
    target = {"w": torch.zeros(shape, dtype=dtype)}
    load_checkpoint(tmp_path, target)
    assert target["w"].to(torch.complex128).equal(value.to(torch.complex128))


def test_a_manifest_of_another_step_than_its_folder(saved):
    renamed = saved.rename(saved.with_name("step_00000009"))
    with pytest.raises(UserError, match=r"manifest\.json: written for step 3, so the folder was renamed"):
        load_checkpoint(renamed, {})
    chosen = renamed.rename(saved.with_name("best"))  # a name of the user's own says no step
    target = {"w": torch.zeros(8, 3), "n": torch.tensor(0)}
    load_checkpoint(chosen, target)
    assert target["n"] == 7


def test_a_pipe_in_a_checkpoint_is_not_waited_for(saved):
    for name in ("extra.json", "manifest.json"):
        (saved / name).unlink()
        os.mkfifo(saved / name)
        with pytest.raises(UserError, match=f"{name}: .*not a regular file"):
            load_checkpoint(saved, {})
