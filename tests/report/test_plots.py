"""What the plots do with long, noisy, sparse or extreme data; the comparison of arms; the two commands."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from report_cases import make_run

from moetrain.errors import UserError
from moetrain.report import comparison_figure, comparison_table, dots, heatmap, report_command, status_command
from moetrain.report.commands import last_checkpoint
from moetrain.report.dots import dots_figure
from moetrain.report.plotting import label, new_figure, robust_limits, running_mean, spread, thin
from moetrain.report.runs import Loads, read_run


def test_thinning_keeps_the_mean_and_the_extremes() -> None:
    x = np.arange(1001.0)
    y = np.where(x == 500, 1e6, 1.0)
    y[:101] = math.nan
    x_mean, mean, low, high = thin(x, y, limit=10)
    assert len(x_mean) == 10
    assert np.nanmax(high) == 1e6
    assert np.nanmin(low) == 1.0
    assert np.isnan(mean[0])
    assert mean[-1] == 1.0
    assert [len(part) for part in thin(x[:5], y[:5], limit=10)] == [5, 5, 5, 5]


def test_running_mean_skips_what_is_not_finite() -> None:
    y = np.array([1.0, math.nan, 3.0, math.inf, math.nan, math.nan])
    np.testing.assert_allclose(running_mean(y, 3), [1.0, 2.0, 3.0, 3.0, math.nan, math.nan])
    np.testing.assert_allclose(running_mean(y, 0), [1, math.nan, 3, math.nan, math.nan, math.nan])


def test_an_axis_is_cut_for_outliers_only() -> None:
    y = np.linspace(2.0, 3.0, 200)
    assert robust_limits(y) is None
    y[7] = 900.0
    limits = robust_limits(y)
    assert limits is not None
    assert 1.9 < limits[0] < 2.0
    assert 3.0 < limits[1] < 4.0
    falling = 2.0 + 9.0 * np.exp(-np.arange(400.0))
    assert robust_limits(falling, usual_top=11.0) is None  # a steep start is no outlier
    diverged = np.concatenate([falling, np.full(100, 1e4)])
    limits = robust_limits(diverged, usual_top=11.0)
    assert limits is not None
    assert 11.0 < limits[1] < 14.0


def test_a_few_items_evenly_spaced() -> None:
    assert spread(list(range(5)), 8) == [0, 1, 2, 3, 4]
    assert spread(list(range(48)), 3) == [0, 24, 47]


def test_names_are_safe_in_a_legend() -> None:
    assert label("_a") == " _a"
    assert label("$x$") == r"\$x\$"


def loads(steps: int, layers: int, experts: int) -> Loads:
    draw = np.random.default_rng(0)
    shares = tuple(draw.dirichlet(np.ones(experts), size=steps) for _ in range(layers))
    return Loads(np.arange(1.0, steps + 1), tuple(range(layers)), shares)


def test_load_maps_stay_readable_for_many_layers_and_experts() -> None:
    plot = heatmap.over_time(loads(211, 17, 67), "big")
    assert "12 of 17 MoE layers are shown" in plot.caption
    assert "Of 67 experts" in plot.caption
    assert "211 recorded steps are averaged into 200 columns" in plot.caption
    assert plot.image.alt.startswith("big")


def test_load_maps_of_a_small_model_show_everything() -> None:
    plot = heatmap.over_time(loads(3, 2, 5), "small")
    assert "shown" not in plot.caption
    assert "averaged" not in plot.caption
    assert "Recorded at step 1" in heatmap.final_map(loads(1, 2, 5), "small").caption


def test_load_maps_of_layers_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map has no number where a layer has no expert."""
    written: list[tuple[int, int]] = []
    monkeypatch.setattr("matplotlib.axes.Axes.text", lambda self, x, y, text, **style: written.append((y, x)))
    shares = tuple(loads(2, 1, experts).shares[0] for experts in (3, 5))
    plot = heatmap.over_time(Loads(np.arange(1.0, 3.0), (1, 4), shares), "x")
    assert plot.image.source.startswith("data:image/")
    heatmap.final_map(Loads(np.arange(1.0, 3.0), (1, 4), shares), "x")
    assert written == [(0, 0), (0, 1), (0, 2), *((1, expert) for expert in range(5))]


def test_idlest_and_busiest_experts_are_kept() -> None:
    relative_PE = np.tile(np.random.default_rng(1).permutation(np.arange(101.0)), (3, 1))
    shown = heatmap._experts_shown(relative_PE)
    assert relative_PE[0, shown].tolist() == [*range(32), *range(69, 101)]


def test_cells_of_a_map_surround_their_steps() -> None:
    np.testing.assert_allclose(heatmap._edges(np.array([1.0, 3.0, 4.0])), [0, 2, 3.5, 4.5])
    np.testing.assert_allclose(heatmap._edges(np.array([5.0])), [4.5, 5.5])


def arms(tmp_path: Path) -> dict[str, list[Path]]:
    def runs(arm: str, count: int, layers: tuple[int, ...]) -> list[Path]:
        return [make_run(tmp_path / f"{arm}{s}", steps=20, seed=s, layers=layers) for s in range(count)]

    return {"moe": runs("moe", 3, (0,)), "dense|twin": runs("dense", 1, ())}


def test_the_comparison_table(tmp_path: Path) -> None:
    table = comparison_table(compared := arms(tmp_path)).splitlines()
    values = []
    for folder in compared["moe"]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        values.append([row["val/bits_per_byte"] for row in rows if "val/bits_per_byte" in row][-1])
    assert len(table) == 4
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert f"| moe | 3 | {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} |" in table[2]
    assert "| 22.6 M | 9.4 M | 17 | 0.164 M | 9,102 ± 0 |" in table[2]
    assert table[3].startswith("| dense\\|twin | 1 | ")
    assert "±" not in table[3]


def test_differences_to_the_first_arm_are_run_by_run(tmp_path: Path) -> None:
    moe, (other,) = arms(tmp_path).values()
    made = [make_run(tmp_path / f"more{s}", steps=20, seed=s + 5, layers=()) for s in range(3)]
    rows = comparison_table({"a|b": made, "moe": moe, "other": [other]}).splitlines()
    last = [read_run(path).last("val/bits_per_byte") for path in [*moe, *made]]
    differences = np.subtract(last[:3], last[3:])
    title, cells = "minus a\\|b", [[cell.strip() for cell in row.split(" | ")] for row in rows]
    assert cells[0].index(title) == 3
    assert cells[3][3] == f"{np.mean(differences):.4f} ± {np.std(differences, ddof=1):.4f}"
    assert [cells[2][3], cells[4][3]] == ["-", "-"]  # to itself; of other numbers of runs


def test_the_comparison_has_routing_figures_of_routers(tmp_path: Path) -> None:
    compared = arms(tmp_path)
    header, _, moe, dense = comparison_table(compared).splitlines()
    assert header.endswith("| load variation | entropy (nats) | drop rate | experts/token | ms/step |")
    values = []
    for folder in compared["moe"]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        values.append(np.mean([row["moe/0/load_cv"] for row in rows if "moe/0/load_cv" in row][-2:]))  # of 20
    assert f"| {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} |" in moe
    assert "| - | - | - | - |" in dense
    assert "load variation" not in comparison_table({"dense": compared["dense|twin"]})


def test_many_arms_are_dots_from_the_best_up(tmp_path: Path) -> None:
    compared = {name: [read_run(path) for path in paths] for name, paths in arms(tmp_path).items()}
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("x: 1\n")
    axes = dots_figure({**compared, "empty": [read_run(empty)]}).axes
    assert [a.get_title(loc="left") for a in axes][:2] == ["bits per byte", "load variation"]
    best = {name: np.mean([run.last("val/bits_per_byte") for run in runs]) for name, runs in compared.items()}
    expected = ["empty", *sorted(best, key=best.__getitem__, reverse=True)]
    assert [t.get_text().strip() for t in axes[0].get_yticklabels()] == expected
    dashed = [line.get_xdata()[0] for line in axes[0].lines if line.get_linestyle() == "--"]
    assert dashed == pytest.approx([best["moe"]])  # of the first arm
    many = {f"arm{i}": paths for i, paths in enumerate([arms(tmp_path)["moe"]] * 8)}
    assert comparison_figure(many, tmp_path / "many.png").stat().st_size > 10_000


@pytest.mark.parametrize(("largest", "scale"), [(30.0, "linear"), (300.0, "symlog")])
def test_a_panel_of_a_few_far_values_goes_by_logarithms(largest: float, scale: str) -> None:
    axes = new_figure(3, 3).subplots()
    dots._log_where_wide(axes, [0.0, 1.0, 2.0, 3.0, largest])
    assert axes.get_xscale() == scale


def test_a_run_without_an_evaluation_leaves_a_gap(tmp_path: Path) -> None:
    compared = arms(tmp_path)
    (compared["moe"][1] / "metrics.jsonl").write_text('{"step": 1, "tokens": 5, "train/loss": 3.0}\n')
    assert "| moe | 3 | - | - |" in comparison_table(compared)


def test_the_comparison_figure_is_a_png(tmp_path: Path) -> None:
    out = comparison_figure(arms(tmp_path), tmp_path / "figures" / "arms.png")
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in out.parent.iterdir()] == ["arms.png"]
    with pytest.raises(UserError, match="cannot write"):
        comparison_figure({}, tmp_path)


def test_report_command_writes_into_the_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("x: 1\n")
    monkeypatch.chdir(tmp_path)
    assert report_command(["a"]) == 0
    assert report_command(["a", "b"]) == 0
    assert report_command(["a", "b", "-o", "c/d.html"]) == 0
    assert capsys.readouterr().out.split() == ["a/report.html", "report.html", "c/d.html"]
    assert all((tmp_path / name).exists() for name in ("a/report.html", "report.html", "c/d.html"))
    with pytest.raises(UserError, match="typo is not a folder"):
        report_command(["typo"])


def test_status_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "done", steps=5)
    running = make_run(tmp_path / "running", steps=7, planned=100)
    (running / "summary.json").unlink()
    row = {"step": 8, "train/loss": 3.25, "tokens_per_second": 12345.0, "time": time.time() - 185}
    with (running / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert status_command([str(tmp_path / "done"), str(running)]) == 0
    head, done, last = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["run", "step", "loss"]
    assert done.split()[1] == "5/5"
    assert done.endswith("step_00000005    finished")
    assert last.split()[:3] == ["running", "8/100", "3.2500"]
    assert "12,345" in last
    assert "unfinished, last step 3 min 0" in last


def test_unfinished_checkpoints_do_not_count(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for name in ("step_00000009", "step_00000010", ".tmp_step_00000011", "step_00000012.tmp", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert last_checkpoint(tmp_path) == "step_00000010"
