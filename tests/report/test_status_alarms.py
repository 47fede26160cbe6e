"""``moetrain status`` of runs with alarms, while they run and when they are over."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_cases import make_run, write_lines

from moetrain.report.commands import status_command

RAISED = {"alarm": "collapse", "raised": True, "why": "2.0 of 7 experts", "suggestion": "balance=aux_free"}
OVER = {"alarm": "collapse", "raised": False, "why": "", "suggestion": None}
SPIKE = {"step": 9, "alarm": "loss_spike", "raised": True, "layers": [], "why": "\x1b[7m", "suggestion": None}


def said(*runs: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert status_command([str(run) for run in runs]) == 0
    lines: list[str] = capsys.readouterr().out.splitlines()
    return lines


@pytest.mark.parametrize("over", [False, True])
def test_alarms_that_last_come_first(over, tmp_path, capsys):
    run = make_run(tmp_path / "a", steps=20)
    if not over:
        (run / "summary.json").unlink()
    rows = [{"step": 7, "layers": [1, 3], **RAISED}, SPIKE, {"step": 11, "layers": [3], **OVER}]
    write_lines(run / "alarms.jsonl", rows)
    lines = said(run, capsys=capsys)
    assert lines[1].endswith("finished") is over
    assert lines[2:4] == ["", "alarms of a"]
    assert [line.split() for line in lines[4:]] == [
        ["Step", "Alarm", "Where", "What", "May", "help", "Over", "at", "step"],
        ["9", "loss_spike", "the", "run", *lines[5].split()[4:5], "-", "-"],
        ["7", "collapse", "layer", "1", "2.0", "of", "7", "experts", "balance=aux_free", "-"],
        ["7", "collapse", "layer", "3", "2.0", "of", "7", "experts", "balance=aux_free", "11"],
    ]
    assert "\x1b" not in "".join(lines)


def test_a_run_without_alarms_says_nothing_of_them(tmp_path, capsys):
    quiet, loud = make_run(tmp_path / "quiet", steps=5), make_run(tmp_path / "loud", steps=5)
    write_lines(loud / "alarms.jsonl", [{"step": 2, "layers": [0], **RAISED}])
    lines = said(quiet, loud, capsys=capsys)
    assert [line for line in lines if line.startswith("alarms of")] == ["alarms of loud"]


def test_of_many_alarms_those_that_last_are_kept(tmp_path, capsys):
    run = make_run(tmp_path / "a", steps=20)
    rows = [{"step": 1, "layers": [63], **RAISED}]
    rows += [{"step": 2, "layers": [n], **RAISED} for n in range(20)]
    rows += [{"step": 3, "layers": [n], **OVER} for n in range(20)]
    write_lines(run / "alarms.jsonl", rows)
    lines = said(run, capsys=capsys)[5:]
    assert len(lines) == 17
    assert lines[0].split()[:4] == ["1", "collapse", "layer", "63"]
    assert lines[1].split()[:4] == ["2", "collapse", "layer", "19"]
    assert lines[-1] == "... and 5 more"


def test_alarms_behind_a_thousand_others_are_not_lost(tmp_path, capsys):
    run = make_run(tmp_path / "a", steps=20)
    rows = [{"step": 1, "layers": [62, 63], **RAISED}, {"step": 2, "layers": [62], **OVER}]
    rows += [{"step": n, "layers": [0], **(OVER if n % 2 else RAISED)} for n in range(4, 1004)]
    rows += [{**SPIKE, "step": 1004}]
    write_lines(run / "alarms.jsonl", rows)
    lines = said(run, capsys=capsys)
    shown = [line.split()[:4] for line in lines if "loss_spike" in line or "collapse" in line]
    assert shown[:3] == [
        ["1004", "loss_spike", "the", "run"],
        ["1", "collapse", "layer", "63"],
        ["1002", "collapse", "layer", "0"],
    ]
    assert ["1", "collapse", "layer", "62"] not in shown
