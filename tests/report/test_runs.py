"""Reading run folders in any state."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_cases import make_run, write_lines

from moetrain.errors import UserError
from moetrain.report.runs import read_run, read_runs, short_names


def test_series_are_sorted_and_the_last_row_of_a_step_wins(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3)
    rows = [{"step": 2, "train/loss": 5.0}, {"step": 1, "train/loss": 7.0}, {"step": 2, "train/loss": 4.0}]
    write_lines(tmp_path / "metrics.jsonl", rows)
    steps, loss = read_run(tmp_path).series("train/loss")
    assert steps.tolist() == [1, 2]
    assert loss.tolist() == [7.0, 4.0]


def test_torn_and_foreign_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    make_run(tmp_path, steps=5)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "train/loss": NaN}\n[1, 2]\n\xff\xfe garbage\n{"step": 7, "train/lo')
    run = read_run(tmp_path)
    assert run.series("train/loss")[0].tolist() == [1, 2, 3, 4, 5, 6]
    assert math.isnan(run.last("train/loss"))
    assert run.notes == ["metrics.jsonl: 3 unreadable lines were skipped"]


def test_values_that_are_no_numbers_read_as_nan(tmp_path: Path) -> None:
    make_run(tmp_path, steps=1)
    values: list[Any] = [None, "text", True, [1], 10**400]
    write_lines(tmp_path / "metrics.jsonl", [{"step": i, "x": v} for i, v in enumerate(values)])
    read = read_run(tmp_path).series("x")[1]
    assert np.isnan(read[:4]).all()
    assert math.isinf(read[4])


def test_an_empty_run_folder_is_read_with_notes(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{ not: [closed")
    (tmp_path / "summary.json").write_text("[]")
    run = read_run(tmp_path)
    assert not run.columns
    assert run.loads is None
    assert run.config() == {}
    assert "metrics.jsonl is missing" in run.notes
    assert "summary.json is not a JSON object" in run.notes


def test_loads_keep_the_rows_of_the_newest_shape(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3, layers=(2, 5), experts=3)
    rows: list[dict[str, Any]] = [
        {"step": 1, "load": [[0.5, 0.5]]},
        {"step": 3, "load": [[0.2, 0.3, 0.5], [1, 0, 0]], "layers": [2, 5]},
        {"step": 2, "load": [[0.1, 0.1, 0.8], [0, 0, 1]]},
        {"step": 4, "load": [[0.1], [[0.2, 0.3]]]},
        {"step": 5},
    ]
    write_lines(tmp_path / "load.jsonl", rows)
    loads = read_run(tmp_path).loads
    assert loads is not None
    assert loads.steps.tolist() == [2, 3]
    assert loads.layers == (2, 5)
    np.testing.assert_allclose(loads.relative[0][1], [0.6, 0.9, 1.5])


def test_loads_of_layers_that_differ(tmp_path: Path) -> None:
    make_run(tmp_path)
    rows = [{"step": n, "load": [[0.5, 0.5], [0.1, 0.2, 0.7]], "layers": [1, 3]} for n in (1, 2)]
    write_lines(tmp_path / "load.jsonl", rows)
    loads = read_run(tmp_path).loads
    assert loads is not None
    assert [share_PE.shape for share_PE in loads.shares] == [(2, 2), (2, 3)]
    np.testing.assert_allclose(loads.relative[1][0], [0.3, 0.6, 2.1])


def test_samples_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    make_run(tmp_path, steps=2)
    for name in ("step_9.txt", "step_10.txt"):
        (tmp_path / "samples" / name).write_text(name)
    names = [name for name, _ in read_run(tmp_path).samples]
    assert names == ["step_00000002.txt", "step_9.txt", "step_10.txt"]


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    paths = [Path("/r/a/seed0"), Path("/r/b/seed0")]
    assert short_names(paths) == ["a/seed0", "b/seed0"]
    make_run(tmp_path / "x", steps=1)
    assert [run.name for run in read_runs([tmp_path / "x", tmp_path / "y" / ".." / "x"])] == ["x"]


def test_what_is_no_run_folder_is_refused_with_a_hint(tmp_path: Path) -> None:
    make_run(tmp_path / "first", steps=1)
    with pytest.raises(UserError, match="holds the runs first"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        read_run(tmp_path / "typo")
