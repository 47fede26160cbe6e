"""What a rank says in its file of the run folder, and what a reader makes of it."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from moetrain.errors import UserError, write_error_file
from moetrain.parallel.process import boot_id
from moetrain.parallel.watchdog import rank_file
from moetrain.parallel.watchdog.flight_recorder import at, patiently
from moetrain.parallel.watchdog.rank_file import RankFile
from moetrain.parallel.watchdog.rank_record import SIZE, RankRecord, path_of, read_record, read_records

NOBODY = 2**22 + 1  # above the system's highest process id
RECORD = RankRecord(3, 7, "node5", "boot", NOBODY, 100.0, 200.0, 2.0, "step 8", 1.5)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(rank_file, "_EVERY", 0.02)


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.005)


def test_the_file_follows_the_rank(tmp_path):
    file = path_of(tmp_path, 3)
    with RankFile(tmp_path, 3, 7) as beats:
        first = read_record(file)
        assert (first.rank, first.world, first.pid, first.ended) == (3, 7, os.getpid(), "")
        beats.speed = lambda: 1234.5
        at("step 9")
        until(lambda: read_record(file).doing == "step 9")
        until(lambda: read_record(file).speed == 1234.5)
        with patiently("saving a checkpoint"):
            until(lambda: read_record(file).doing == "step 9, saving a checkpoint")
        until(lambda: read_record(file).doing == "step 9")
        assert read_record(file).state(time.time()) == "running"
        assert file.stat().st_size == SIZE
    last = read_record(file)
    assert (last.state(time.time()), last.wrong) == ("finished", "")
    assert tuple(path.name for path in file.parent.iterdir()) == ("rank_00003.json",)


def test_an_error_is_the_last_word_and_outlives_the_next_start(tmp_path):
    with pytest.raises(ZeroDivisionError), RankFile(tmp_path, 0, 1):
        1 / 0  # noqa: B018
    assert read_record(path_of(tmp_path, 0)).ended == "division by zero"
    with RankFile(tmp_path, 0, 1):
        now = read_record(path_of(tmp_path, 0))
        assert (now.ended, now.wrong) == ("", "division by zero")
        assert 0 < now.wrong_at <= now.start


def test_any_thread_may_end_the_process(tmp_path):
    """As the watchdog does, which leaves by os._exit as soon as the line is told."""
    with RankFile(tmp_path, 0, 2):
        thread = threading.Thread(target=write_error_file, args=("rank 1: lost" + " é\x1b\n" * 2000,))
        thread.start()
        thread.join()
        record = read_record(path_of(tmp_path, 0))
        assert record.ended.startswith("rank 1: lost ?? ")
        assert record.wrong == record.ended
    assert read_record(path_of(tmp_path, 0)).ended == record.ended


def test_being_asked_to_stop_is_nothing_wrong(tmp_path):
    with RankFile(tmp_path, 0, 1) as beats:
        beats.stopped("stopped after step 4 (SIGTERM)")
        write_error_file("stopped after step 4 (SIGTERM); saved here")
    record = read_record(path_of(tmp_path, 0))
    assert (record.ended, record.wrong) == ("stopped after step 4 (SIGTERM)", "")


def test_a_start_that_was_killed_is_what_went_wrong(tmp_path):
    with RankFile(tmp_path, 3, 7):
        pass
    write(tmp_path, RECORD)
    with RankFile(tmp_path, 3, 7):
        record = read_record(path_of(tmp_path, 3))
    assert record.wrong.startswith("ended without a word")
    assert record.wrong.endswith("it was in: step 8")
    assert record.wrong_at == 200.0


def write(run: Path, record: RankRecord) -> None:
    path_of(run, record.rank).write_text(json.dumps(asdict(record)))


@pytest.mark.parametrize(
    ("changed", "age", "state"),
    [
        ({"boot": "elsewhere"}, 9, "running"),
        ({"boot": "elsewhere"}, 11, "silent"),
        ({"boot": boot_id()}, 3, "running"),  # a beat may be late
        ({"boot": boot_id()}, 5, "dead"),
        ({"boot": boot_id(), "pid": os.getpid()}, 5, "running"),
        ({"boot": boot_id(), "pid": os.getpid()}, 11, "silent"),
        ({"ended": "finished"}, 1000, "finished"),
        ({"boot": "elsewhere"}, -3600, "running"),  # the clock was set back
    ],
)
def test_what_a_reader_makes_of_it(changed, age, state):
    assert replace(RECORD, **changed).state(RECORD.beat + age) == state


def test_a_folder_that_takes_no_file_ends_nothing(tmp_path):
    (tmp_path / "ranks").write_text("")
    with RankFile(tmp_path, 0, 1):
        time.sleep(0.05)
    (tmp_path / "ranks").unlink()
    with RankFile(tmp_path, 0, 1):  # a start that fails removes what it made, under the others' hands
        path_of(tmp_path, 0).unlink()
        time.sleep(0.1)
    assert list((tmp_path / "ranks").iterdir()) == []


def test_a_slow_disk_holds_nobody_up(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_file, "_LAST", 0.05)
    held = threading.Event()
    with RankFile(tmp_path, 0, 1):
        monkeypatch.setattr(rank_file.os, "pwrite", lambda *arguments: held.wait(20))
        time.sleep(0.05)
        began = time.monotonic()
        write_error_file("the end")
        assert time.monotonic() - began < 5
    held.set()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"rank": -1}', "x" * 5000, '{"rank": 1e400}'])
def test_files_that_are_no_records_are_passed_over(text, tmp_path):
    (tmp_path / "ranks").mkdir()
    write(tmp_path, RECORD)
    path_of(tmp_path, 1).write_text(text)
    with pytest.raises(UserError):
        read_record(path_of(tmp_path, 1))
    assert read_records(tmp_path) == [RECORD]
