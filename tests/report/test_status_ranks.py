"""``moetrain status`` of ranks that run, hang, died, ended or finished."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from report_cases import make_run

from moetrain.parallel.process import boot_id
from moetrain.parallel.watchdog.rank_record import FINISHED, RankRecord, path_of
from moetrain.report.commands import status_command

NOBODY = 2**22 + 1


def record(rank: int, world: int = 3, **changed: object) -> RankRecord:
    now = time.time()
    made = RankRecord(rank, world, "node5", "elsewhere", 4711, now - 90, now, 2.0, "step 8", 0.4, 1234.0)
    return replace(made, **changed)  # type: ignore[arg-type]


def said(run: Path, records: list[RankRecord], capsys: pytest.CaptureFixture[str]) -> list[str]:
    make_run(run, steps=7, planned=100, layers=())
    (run / "summary.json").unlink()
    return again(run, records, capsys)


def again(run: Path, records: list[RankRecord], capsys: pytest.CaptureFixture[str]) -> list[str]:
    (run / "ranks").mkdir(exist_ok=True)
    for one in records:
        path_of(run, one.rank).write_text(json.dumps(asdict(one)))
    assert status_command([str(run)]) == 0
    lines: list[str] = capsys.readouterr().out.splitlines()
    return lines


def test_ranks_that_run(tmp_path, capsys):
    lines = said(tmp_path / "a", [record(rank) for rank in range(3)], capsys)
    assert "running on 3 rank(s), last step" in lines[1]
    assert lines[3:5] == [
        "ranks of a",
        "rank  state    tokens/s  heard of  was doing  for  process",
    ]
    assert [line.split()[:3] for line in lines[5:]] == [[str(r), "running", "1,234"] for r in range(3)]
    assert lines[5].endswith("step 8     0 s  4711 on node5")


def test_a_rank_that_hangs_and_one_that_is_dead_come_first(tmp_path, capsys):
    place = "step 8, in blocks.1.feed_forward, counts (all_to_all, forward)"
    records = [
        record(0, doing=place, seconds=47.0),
        record(1, boot=boot_id(), pid=NOBODY, beat=time.time() - 60),
        record(2, beat=time.time() - 130),
    ]
    lines = said(tmp_path / "a", records, capsys)
    assert "1 dead, 1 running, 1 silent, of 3 rank(s), last step" in lines[1]
    assert [line.split()[:2] for line in lines[5:]] == [["1", "dead"], ["2", "silent"], ["0", "running"]]
    assert f"{place}  47 s" in lines[7]
    assert "2 min 10 s ago" in lines[6]


def test_what_went_wrong_last_stays(tmp_path, capsys):
    now = time.time()
    records = [
        record(0, wrong="rank 2: lost", wrong_at=now - 61),
        record(1, wrong="older", wrong_at=now - 3000),
        record(2),
    ]
    told = "a: went wrong last, 1 min 01 s ago: rank 0: "
    assert said(tmp_path / "a", records, capsys)[-1] == f"{told}rank 2: lost"
    records[0] = record(0, wrong="rank 0: waited", wrong_at=now - 61)
    assert again(tmp_path / "a", records, capsys)[-1] == f"{told}waited"


def test_ended_and_finished_ranks(tmp_path, capsys):
    wrong = "waited 5.0 s (parallel.timeout=5)"
    ended = {"ended": wrong, "wrong": wrong, "wrong_at": time.time()}
    lines = said(tmp_path / "a", [record(rank, **ended) for rank in range(3)], capsys)
    assert "3 ended, of 3 rank(s)" in lines[1]
    assert lines[-1].endswith(f"rank 0: {wrong}")
    for end in (FINISHED, "stopped after step 8 (SIGTERM)"):
        assert len(again(tmp_path / "a", [record(rank, ended=end) for rank in range(3)], capsys)) == 2


def test_records_of_a_start_with_more_ranks_are_old(tmp_path, capsys):
    old = [record(rank, world=5, start=1.0, beat=2.0) for rank in range(5)]
    lines = said(tmp_path / "a", [record(0, world=2), record(1, world=2), *old[2:]], capsys)
    assert "running on 2 rank(s)" in lines[1]
    assert len(lines) == 7


def test_many_ranks_are_counted(tmp_path, capsys):
    world = 37
    lines = said(tmp_path / "a", [record(rank, world=world) for rank in range(world)], capsys)
    assert len(lines) == 5 + 32 + 1
    assert lines[-1] == "and 5 more"
