"""Rows of jsonl and parquet: the columns asked for, as they stand, in bounded memory, compressed or not."""

import bz2
import gzip
import json
import lzma
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import jsonl, texts, write

from moetrain.data.documents import Document
from moetrain.data.sources import json_rows, local
from moetrain.data.sources.local import LocalSource
from moetrain.errors import UserError


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


SQUEEZE = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}
LINES = b'{"text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'\xef\xbb\xbf{"text": "a"}\r\n\r\n \t\n{"text": "b"}', ["a", "b"]),
        (
            b'{"text": "a", "url": null}\n{"text": "b", "url": 3}\n{"text": "c", "new": {"k": []}}',
            ["a", "b", "c"],
        ),
        (b'{"id": 1}\n{"id": 2, "text": "late"}\n{"text": null}', ["late"]),
        (b'{"text": "2024-01-02T03:04:05"}', ["2024-01-02T03:04:05"]),
        (b'{"text": "\\ud83d cut \\ude00"}', ["\ud83d cut \ude00"]),
        (b'{"text": "\xed\xa0\x80"}', ["\ud800"]),
        (b'{"n": ' + b"9" * 5000 + b', "x": NaN, "text": "wide"}', ["wide"]),
        (b'{"text": "nul \\u0000 inside"}', ["nul \0 inside"]),
        (b'{\n  "text": "pretty"\n}\n{\n  "text": "printed"\n}\n', ["pretty", "printed"]),
        (b' [\n {"text": "a"},\n {"text": "b"}]\n', ["a", "b"]),
        (b'["a", "b"]', ["a", "b"]),
        (b"[]", []),
        (b"[", "row 0: Expecting value"),
        (b'[{"text": "a"} {"text": "b"}]', "row 1: Expecting ',' or ']'"),
        (b'[{"text": "a"}] x', "row 1: Extra data"),
        (b'{"text": "a"}\n{"text": "b"', r"row 1 \(line 2\)"),
        (b'{"text": "a"}\n\n{"text": "\xff"}', r"row 1 \(line 3\) is not UTF-8 \(byte 10: 0xff\)"),
        (b'{"text": "a"}\nnull', "row 1 is no object but null"),
        (b'{"text": "a"}\n\0\0\0\0', r"row 1 \(line 2\): Expecting value"),
        (b'{"text": "a"}\n{"x": ' + b"[" * 100_000, r"row 1 \(line 2\): it is nested too deeply"),
        (b"[" * 100_000, "row 0: it is nested too deeply"),
        (b'{"text": {"a": 1}}', "row 0: 'text' holds dict, not text"),
        (b'{"b": 1}\n{"c": 1}', r"no column 'text' \(data\.text_key\); it has: b$"),
    ],
    ids=[
        "mark and blank lines",
        "types change",
        "late column",
        "dates",
        "half surrogates",
        "raw surrogate",
        "wide",
        "nul escape",
        "pretty",
        "array",
        "array of text",
        "empty array",
        "cut array",
        "no comma",
        "extra",
        "cut row",
        "not utf-8",
        "null row",
        "nul bytes",
        "deep",
        "deep array",
        "object",
        "other names",
    ],
)
def test_rows_of_jsonl_are_read_as_they_stand(tmp_path, content, expected):
    source = LocalSource(str(write(tmp_path / "rows.jsonl", content)))
    if isinstance(expected, list):
        assert texts(source) == expected
        return
    with pytest.raises(UserError, match=expected) as caught:
        texts(source)
    assert str(tmp_path / "rows.jsonl") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_are_what_the_column_says(tmp_path):
    labels = ["x", 3, True, None, {"a": 1}, "\ud83d", "2024-01-02"]
    rows = jsonl(tmp_path / "a.jsonl", [{"text": "t", "kind": label} for label in labels])
    rows.write_text(rows.read_text() + '{"text": "t"}\n')
    found = [document.domain for document in LocalSource(str(rows), domain_key="kind").documents()]
    assert found == ["x", "3", "True", "None", "{'a': 1}", "?", "2024-01-02", "None"]


@pytest.mark.parametrize("kind", sorted(SQUEEZE))
def test_compressed_files_are_read_whatever_their_name(tmp_path, kind):
    squeezed = SQUEEZE[kind](LINES)
    for name in (f"a.jsonl.{kind}", f"a.{kind}.jsonl", "a.jsonl"):
        write(tmp_path / name, squeezed + SQUEEZE[kind](LINES))  # two streams in one file, as tools join them
        assert texts(LocalSource(str(tmp_path / name))) == ["one", "two"] * 2
    write(tmp_path / f"a.txt.{kind}", SQUEEZE[kind]("é".encode()))
    assert texts(LocalSource(str(tmp_path / f"a.txt.{kind}"))) == ["é"]
    write(tmp_path / f"plain.jsonl.{kind}", LINES)  # what a browser has decompressed
    assert texts(LocalSource(str(tmp_path / f"plain.jsonl.{kind}"))) == ["one", "two"]
    write(tmp_path / f"nothing.jsonl.{kind}", SQUEEZE[kind](b""))
    assert texts(LocalSource(str(tmp_path / f"nothing.jsonl.{kind}"))) == []
    whole = SQUEEZE[kind](LINES * 20_000)
    half = whole[: len(whole) // 2]
    write(tmp_path / f"cut.jsonl.{kind}", half)
    write(tmp_path / f"bad.txt.{kind}", half + b"junk" * 100)
    for name in ("cut.jsonl", "bad.txt"):
        with pytest.raises(UserError, match=rf"{name}\.{kind} cannot be decompressed: its \w+ data is cut"):
            texts(LocalSource(str(tmp_path / f"{name}.{kind}")))


@pytest.mark.parametrize("kind", sorted(SQUEEZE))
def test_what_inflates_past_all_measure_is_refused(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_LINE", 2**20)
    monkeypatch.setattr(json_rows, "MAX_WHOLE", 2**20)
    monkeypatch.setattr(local, "_SMALL", 2**20)
    bomb = b'{"text": "' + b"x" * 2**23 + b'"}'
    for name, content in (("a.jsonl", bomb), ("a.json", b"[\n" + bomb), ("a.txt", bomb)):
        write(tmp_path / f"{name}.{kind}", SQUEEZE[kind](content))
        with pytest.raises(UserError, match=r"a line has more|does not end with its line|once decompressed"):
            texts(LocalSource(str(tmp_path / f"{name}.{kind}")))
    long = jsonl(tmp_path / "long.jsonl", [{"text": "y" * (2**20 - 13)}])  # as long as a line may be
    assert [len(text) for text in texts(LocalSource(str(long)))] == [2**20 - 13]


def test_a_mistaken_column_is_told_before_a_huge_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_FIRST_ROWS", 10)
    rows = jsonl(tmp_path / "a.jsonl", [{"body": "x"}] * 20 + [{"text": 3}])
    with pytest.raises(UserError, match=r"no column 'text' .* it has: body"):
        texts(LocalSource(str(rows)))


WORDS = ["one", None, "drei é"]
TYPES = {
    "string": pa.array(WORDS),
    "large": pa.array(WORDS, pa.large_string()),
    "dictionary": pa.array(WORDS).dictionary_encode(),
    "bytes": pa.array([word and word.encode() for word in WORDS], pa.binary()),
}


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_parquet_text_is_text_however_it_is_stored(tmp_path, kind):
    wrong = pa.array([{"bytes": b"\xff", "path": None}] * 3)
    info = {"info": {"features": {"text": {"_type": "NewerThanThis"}, "image": {"_type": "Image"}}}}
    table = pa.table({"image": wrong, "m": pa.array([[("k", 1)]] * 3, pa.map_(pa.string(), pa.int64()))})
    table = table.append_column("text", TYPES[kind]).append_column("when", pa.array([1, 2, 3], pa.date32()))
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    found = list(LocalSource(str(tmp_path / "a.parquet"), domain_key="when").documents())
    assert found == [Document("one", "1970-01-02"), Document("drei é", "1970-01-04")]


def test_parquet_names_with_dots_and_shards_without_rows(tmp_path):
    nested = pa.array([{"text": "inner"}])
    pq.write_table(pa.table({"a": nested, "a.text": pa.array(["outer"])}), tmp_path / "a.parquet")
    assert texts(LocalSource(str(tmp_path / "a.parquet"), text_key="a.text")) == ["outer"]
    pq.write_table(pa.table({"text": pa.array([], pa.null())}), tmp_path / "a.parquet")
    assert texts(LocalSource(str(tmp_path / "a.parquet"))) == []
    pq.write_table(pa.table({"text": pa.array([None, None], pa.null())}), tmp_path / "a.parquet")
    assert texts(LocalSource(str(tmp_path / "a.parquet"))) == []


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"text": pa.array([1])}, "row 0: 'text' holds int, not text"),
        ({"text": pa.array(["ok", None, b"\xff"], pa.binary())}, "row 2: not UTF-8 text"),
        ({"a": pa.array(["x"]), "b": pa.array([1])}, r"no column 'text' \(data\.text_key\); it has: a, b"),
        ({"a": pa.array([{"text": "x"}])}, "no column 'text'"),
    ],
    ids=["number", "no text", "other names", "nested"],
)
def test_parquet_without_text_is_one_line(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message) as caught:
        texts(LocalSource(str(tmp_path / "a.parquet")))
    assert str(tmp_path / "a.parquet") in str(caught.value)


def test_damaged_parquet_is_one_line(tmp_path):
    pq.write_table(pa.table({"text": ["some words"] * 500}), tmp_path / "a.parquet", compression="zstd")
    whole = (tmp_path / "a.parquet").read_bytes()
    for damaged in (whole[:-9], whole[:20] + b"\xff" * 40 + whole[60:], b"PAR1" * 3, b""):
        (tmp_path / "a.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.parquet cannot be read as parquet") as caught:
            texts(LocalSource(str(tmp_path / "a.parquet")))
        assert "\n" not in str(caught.value)


def test_local_rows_are_read_without_the_library_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    pq.write_table(pa.table({"text": ["y"]}), tmp_path / "b.parquet")
    assert texts(LocalSource(str(tmp_path))) == ["x", "y"]


def test_rows_without_text_are_counted_in_one_warning(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"other": "b"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    source = LocalSource(str(tmp_path))
    for _ in range(2):
        assert [document.text for document in source.documents()] == ["a", "b"]
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'a.jsonl'}: 2 of 3 rows have no 'text': left out"
    ]
