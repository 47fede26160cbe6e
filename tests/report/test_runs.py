"""Reading run folders in any state; ``make_run`` writes the folders that the report's other tests use."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetrain.errors import UserError
from moetrain.report.runs import read_run, read_runs, short_names


def make_run(
    folder: Path,
    *,
    steps: int = 60,
    planned: int | None = None,
    layers: tuple[int, ...] = (1, 3, 5),
    experts: int = 7,
    seed: int = 0,
    dropped: bool = False,
    finished: bool = True,
    domains: tuple[str, ...] = (),
) -> Path:
    """A run folder with falling losses and loads that spread slowly. ``layers`` () is a dense model."""
    rng = np.random.default_rng(seed)
    for name in ("checkpoints", "samples"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    favour = rng.normal(size=(len(layers), experts))
    metrics, loads = [], []
    for step in range(1, steps + 1):
        loss = 2.2 + 6 * math.exp(-6 * step / steps) + 0.05 * rng.normal()
        row: dict[str, Any] = {"step": step, "tokens": 8192 * step, "train/loss": loss}
        row |= {"train/lr": 1e-3 * min(1, step / 10), "train/grad_norm": 0.5 + 3 / step}
        row |= {"tokens_per_second": 9000 + 300 * rng.normal(), "time": 1.7e9 + step}
        share = np.exp(favour * 0.8 * step / steps)
        share /= share.sum(1, keepdims=True)
        for i, layer in enumerate(layers):
            row[f"moe/{layer}/max_load"] = share[i].max() * experts
            row[f"moe/{layer}/load_cv"] = share[i].std() * experts
            row[f"moe/{layer}/entropy"] = math.log(experts) * (1 - 0.3 * (step / steps) * (i + 1) / 3)
            row[f"moe/{layer}/dead_experts"] = 0
            row[f"moe/{layer}/drop_rate"] = 0.02 * rng.random() if dropped else 0.0
        metrics.append(row)
        if layers and step % max(1, steps // 100) == 0:
            loads.append({"step": step, "layers": list(layers), "load": share.round(5).tolist()})
        if step % max(1, steps // 5) == 0:
            evaluation = {"step": step, "tokens": 8192 * step, "val/loss": loss + 0.1}
            evaluation |= {"val/perplexity": math.exp(loss + 0.1), "val/bits_per_byte": (loss + 0.1) / 2.5}
            evaluation |= {f"val/{d}/bits_per_byte": loss / 2 + i / 10 for i, d in enumerate(domains)}
            metrics.append(evaluation)
    _write_lines(folder / "metrics.jsonl", metrics)
    if layers:
        _write_lines(folder / "load.jsonl", loads)
    summary = {"finished": finished, "step": steps, "tokens": 8192 * steps, "seconds": 0.9 * steps}
    summary |= {"tokens_per_second": 9102.0, "params_total": 22_600_000, "params_active": 9_400_000}
    summary |= {"flops_per_token": 17_000_000} | ({} if finished else {"reason": "SIGTERM"})
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "seed": seed}))
    config = f"model:\n  num_experts: {experts}\ntrain:\n  steps: {planned or steps}\n  seed: {seed}\n"
    (folder / "config.yaml").write_text(config)
    (folder / "checkpoints" / f"step_{steps:08}").mkdir(exist_ok=True)
    (folder / "samples" / f"step_{steps:08}.txt").write_text("def add(a, b):\n    return a + b\n")
    return folder


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_series_are_sorted_and_the_last_row_of_a_step_wins(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3)
    rows = [{"step": 2, "train/loss": 5.0}, {"step": 1, "train/loss": 7.0}, {"step": 2, "train/loss": 4.0}]
    _write_lines(tmp_path / "metrics.jsonl", rows)
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
    _write_lines(tmp_path / "metrics.jsonl", [{"step": i, "x": v} for i, v in enumerate(values)])
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
    _write_lines(tmp_path / "load.jsonl", rows)
    loads = read_run(tmp_path).loads
    assert loads is not None
    assert loads.steps.tolist() == [2, 3]
    assert loads.layers == (2, 5)
    np.testing.assert_allclose(loads.relative[0][1], [0.6, 0.9, 1.5])


def test_loads_of_layers_that_differ(tmp_path: Path) -> None:
    make_run(tmp_path)
    rows = [{"step": n, "load": [[0.5, 0.5], [0.1, 0.2, 0.7]], "layers": [1, 3]} for n in (1, 2)]
    _write_lines(tmp_path / "load.jsonl", rows)
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
