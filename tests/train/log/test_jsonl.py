"""Files of rows that were damaged: the run goes on, what is no row is set aside, memory stays small."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import subprocess
import sys

import pytest
import tiny

from moetrain.errors import UserError
from moetrain.train.log.jsonl import LONGEST, JsonlFile, last_row, read_lines, read_metrics, row_in
from moetrain.train.run_dir import RunDir

DEEP = "[" * 10**5

DAMAGED = {
    "half": '{"step": 2, "tok',
    "nul": "\0\0\0\0",
    "list": "[1, 2]",
    "text_step": '{"step": "7"}',
    "null_step": '{"step": null}',
    "true_step": '{"step": true}',
    "float_step": '{"step": 2.0}',
    "huge_float_step": '{"step": 1e300}',
    "huge_step": '{"step": 1' + "0" * 30 + "}",
    "negative_step": '{"step": -1}',
    "deep": '{"step": 1, "x": ' + DEEP,
    "many_digits": '{"step": ' + "9" * 5000 + "}",
    "no_utf8": '{"step": 2, "x": "\udcff"}',
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_line_that_is_no_row_is_set_aside(tmp_path, caplog, name, place):
    lines = ['{"step": 1}', '{"step": 2, "val/loss": 1.5}', '{"step": 3}']
    lines.insert(place, DAMAGED[name])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
    with caplog.at_level(logging.WARNING):
        assert JsonlFile(path).truncate_after(2) == 2
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "val/loss": 1.5}]
    rejected = (tmp_path / "metrics.rejected.jsonl").read_bytes()
    assert rejected == DAMAGED[name].encode(errors="surrogateescape") + b"\n"
    assert f"1 damaged line (the first is line {place + 1}) moved to metrics.rejected.jsonl" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.rejected.jsonl"]


@pytest.mark.parametrize("tail", ["\0" * 8, "\0" * 8 + "\n", '{"step": 3, "lo', "\n\n"], ids=repr)
@pytest.mark.parametrize("first", ["truncate", "append"])
def test_what_a_power_cut_leaves_at_the_end(tmp_path, tail, first):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
    file = JsonlFile(path)
    if first == "truncate":
        file.truncate_after(2)
    file.append({"step": 3})
    file.close()
    assert [row["step"] for line in read_lines(path) if (row := line.row)] == [1, 2, 3]
    JsonlFile(path).truncate_after(9)
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


@pytest.mark.parametrize("after", ["none\n", ""])
@pytest.mark.parametrize("row", ['\0\0\0\0{"step": 2}', '{"step": 2}\0'], ids=repr)
def test_a_row_beside_nuls_is_kept_without_them(tmp_path, row, after):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{row}\n{after}{{"step": 9}}\n')
    JsonlFile(path).truncate_after(5)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    ("steps", "after", "kept"),
    [([1, 2, 3, 4], 2, [1, 2]), ([1, 4, 2], 2, [1, 2]), ([3], 2, []), ([], 2, []), ([1, 2], 9, [1, 2])],
    ids=["cut", "rewritten", "all", "empty", "none"],
)
def test_rows_of_later_steps_go(tmp_path, steps, after, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    JsonlFile(path).truncate_after(after)
    assert [row["step"] for row in read_metrics(path)] == kept
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_while_rewriting_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = "".join(f'{{"step": {step}, "x": "{"x" * 200}"}}\n' for step in (1, 9, 2, 3))
    path.write_text(text)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: File too large"):
            JsonlFile(path).truncate_after(5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("steps", "said"),
    [([1, 2, 3], None), ([1], "has no rows of steps 2 to 3"), ([], "has no rows of steps 1 to 3")],
    ids=["whole", "gap", "empty"],
)
def test_rows_that_are_missing_are_said(tmp_path, caplog, steps, said):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    RunDir(tmp_path).truncate_after(3)
    assert [r.message for r in caplog.records] == (
        [] if said is None else [f"{tmp_path}/metrics.jsonl {said}"]
    )


def test_a_new_folder_has_no_rows_to_miss(tmp_path, caplog):
    RunDir(tmp_path).truncate_after(3)  # resume=ANOTHER_RUN
    assert not caplog.records


def test_the_last_row_of_a_kind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_row(path, "val/loss") is None
    path.write_text('{"step": 1, "val/loss": 2}\n{"step": 2, "x": "val/loss"}\n{"val/loss": \n{"step": 3}\n')
    assert last_row(path, "val/loss") == {"step": 1, "val/loss": 2}


def test_an_endless_line_is_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.write(b'{"step": 1}\n{"step": 2, "x": "')
        file.seek(LONGEST + 1000, 1)  # a hole: it takes no room on the disk
        file.write(b'"}\n{"step": 3}\n')
    assert [(line.number, line.row) for line in read_lines(path)] == [
        (1, {"step": 1}),
        (2, None),
        (3, {"step": 3}),
    ]
    assert row_in(b'{"step": 1}') == {"step": 1}


def test_a_large_file_is_never_held(tmp_path):
    row = {"step": 0} | {f"moe/{layer}/{key}": 0.123456789 for layer in range(64) for key in "abcdefg"}
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 4001):
            file.write(json.dumps(row | {"step": step}) + "\n")
    size = (tmp_path / "metrics.jsonl").stat().st_size
    code = f"""
import re
from pathlib import Path
from moetrain.train.log.jsonl import JsonlFile, last_row
def peak(): return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before, path = peak(), Path({str(tmp_path / "metrics.jsonl")!r})
file = JsonlFile(path)
assert file.truncate_after(3990) == 3990
file.append({{"step": 3991}})
assert last_row(path, "moe/3/a")["step"] == 3990
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert size > 40e6
    assert int(done.stdout) < 10e6


@pytest.mark.usefixtures("training")
def test_a_damaged_line_does_not_stop_a_resume(corpus, trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for name in ("metrics", "load"):
        lines = (run / f"{name}.jsonl").read_bytes().splitlines()
        lines[1], lines[3] = b'{"step": 2, "tok', b"\0\0"
        (run / f"{name}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines) + b"\0" * 9)
    assert tiny.train(corpus, run, *tiny.TRAINED, "train.steps=14") == 0
    assert {row["step"] for row in tiny.steps(run)} >= {5, 10, 13, 14}
    assert (run / "metrics.rejected.jsonl").read_bytes() == b'{"step": 2, "tok\n\0\0\n'
    assert (run / "load.rejected.jsonl").exists()
