"""Reports of runs whose files hold odd values: a page or one line, in seconds, with bounded memory."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from report_cases import make_run

from moetrain.report import columns
from moetrain.report.columns import MAX_KEYS, number
from moetrain.report.commands import report_command, status_command
from moetrain.report.page import render
from moetrain.report.runs import read_run, read_runs

DEEP = "[" * 10**5 + "]" * 10**5
ODD: list[Any] = [
    1e308,
    -1e308,
    5e-324,
    1e15,
    -1,
    0,
    10**300,
    10**400,
    2**62,
    None,
    True,
    "x",
    [],
    {},
    [[1e9]],
]
ODD += [math.nan, math.inf, -math.inf]


def _edit(path: Path, change: dict[int, dict[str, Any]]) -> None:
    lines = path.read_text().splitlines()
    for number_of_line, values in change.items():
        lines[number_of_line] = json.dumps(json.loads(lines[number_of_line]) | values)
    path.write_text("".join(f"{line}\n" for line in lines))


def test_odd_values_everywhere_still_make_a_page(tmp_path: Path) -> None:
    make_run(tmp_path, steps=2 * len(ODD), layers=(1, 3), experts=2)
    keys = ["step", "train/loss", "train/grad_norm", "train/lr", "moe/1/entropy", "time"]
    shifted = {key: ODD[i:] + ODD[:i] for i, key in enumerate(keys)}
    _edit(tmp_path / "metrics.jsonl", {i: {k: v[i] for k, v in shifted.items()} for i in range(len(ODD))})
    more: list[Any] = [[[1, 0]] * 2, [["a", "b"]] * 2, [[10**400, 0]] * 2]
    for key in ("step", "layers", "load"):
        _edit(tmp_path / "load.jsonl", {line: {key: value} for line, value in enumerate([*ODD, *more])})
    page = render(read_runs([tmp_path]))
    assert page.endswith("</html>\n")
    assert "could not be drawn" not in page


def test_shares_that_are_none_are_left_out(tmp_path: Path) -> None:
    make_run(tmp_path, steps=6, layers=(1,), experts=2)
    odd = [[[1.5, 0.5]], [[-0.1, 1.1]], [[math.nan, 1]], [[10**400, 0]], [[0.25, 0.75]], [0.5, 0.5]]
    _edit(tmp_path / "load.jsonl", {line: {"load": load, "layers": 1} for line, load in enumerate(odd)})
    loads = read_run(tmp_path).loads
    assert loads is not None
    assert (loads.steps.tolist(), loads.layers) == ([5], (0,))
    assert [share_PE.tolist() for share_PE in loads.shares] == [[[0.25, 0.75]]]


def test_loads_beyond_the_bound_are_thinned_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, steps=40, layers=(1,), experts=4)
    monkeypatch.setattr(columns, "MAX_LOADS", 40)
    loads = read_run(tmp_path).loads
    assert loads is not None
    assert sum(share_PE.size for share_PE in loads.shares) <= 40
    assert loads.steps[-1] == 40
    assert len(loads.steps) >= 5


def test_keys_beyond_the_bound_are_left_out_and_counted(tmp_path: Path) -> None:
    row = {"step": 1} | {f"k{i}": 1 for i in range(MAX_KEYS + 5)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row))
    run = read_run(tmp_path)
    assert len(run.columns) == MAX_KEYS
    assert f"metrics.jsonl: 6 values beyond the first {MAX_KEYS} keys were left out" in run.notes


@pytest.mark.parametrize(
    ("value", "read"),
    [(1e99, 1e99), (1e101, math.inf), (-(10**400), -math.inf), (3, 3.0)],
    ids=["large", "huge", "no_float", "whole"],
)
def test_numbers_that_nothing_measures_are_infinite(value: Any, read: float) -> None:
    assert number(value) == read


@pytest.mark.parametrize("name", ["summary.json", "environment.json", "config.yaml"])
@pytest.mark.parametrize("content", [DEEP, "\0", "9" * 5000, "a: !!timestamp x", "[1]"], ids=lambda t: t[:8])
def test_other_files_that_are_damaged(
    tmp_path: Path, name: str, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moetrain.report.page.has_matplotlib", lambda: False)  # it takes seconds
    make_run(tmp_path, steps=1, layers=())
    (tmp_path / name).write_text(content)
    assert render(read_runs([tmp_path])).endswith("</html>\n")
    assert status_command([str(tmp_path)]) == 0


def test_a_key_of_many_digits_is_no_layer(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "moe/' + "9" * 5000 + '/load_cv": 1}\n')
    assert read_run(tmp_path).layers("load_cv") == []


def test_pipes_in_a_run_folder_are_not_waited_for(tmp_path: Path) -> None:
    make_run(tmp_path, steps=1, layers=())
    for name in ("summary.json", "load.jsonl", "config.yaml", "samples/step_00000009.txt"):
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
    run = read_run(tmp_path)
    assert len([note for note in run.notes if "regular file" in note or "not a JSON object" in note]) == 4


def test_what_files_say_reaches_the_terminal_without_control(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moetrain.report.page.has_matplotlib", lambda: False)
    run = make_run(tmp_path / "a\x1b[31m<b>", steps=1, layers=())
    (run / "summary.json").write_text(
        json.dumps({"finished": False, "reason": "\x1b]0;owned\x07\nline" * 99})
    )
    (run / "checkpoints" / "x\x1b[2J7").mkdir()
    assert status_command([str(run)]) == 0
    assert report_command([str(run), "-o", str(tmp_path / "r\x1b[1m.html")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert out.count("\n") == 3
    assert "<b>" not in next(tmp_path.glob("r*.html")).read_text()
