"""The HTML report: self-contained, escaped, and written for any state of a run folder."""

from __future__ import annotations

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_cases import make_run, write_lines

from moetrain.errors import UserError
from moetrain.report import write_report
from moetrain.report.page import render
from moetrain.report.runs import read_run, read_runs
from moetrain.report.tables import alarm_table, config_differences, duration, headline, status, whole

TITLES = {"Loss", "Validation bits per byte", "Learning rate", "Gradient norm", "Throughput"}
ROUTING = {"Busiest expert", "Spread of the load", "Router entropy", "Dropped assignments"}


class Page(HTMLParser):
    """What the tests look at: tags, their references, cell texts and all text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.references: list[str] = []
        self.plots: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.references += [v for k in ("src", "href") if (v := values.get(k)) is not None]
        if tag == "img":
            self.plots.append(values["alt"] or "")
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def titles(self) -> set[str]:
        return {alt.split(":")[0] for alt in self.plots}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """One finished run with everything in it, under a name that must be escaped."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "a<b>&$x$", domains=("python", "wiki_fr"))
    (folder / "samples" / "step_9.txt").write_text("</pre><script>alert(1)</script> & text")
    (folder / "environment.json").write_text(json.dumps({"command": "x --y '<script>'"}))
    return folder, Page(write_report([folder], folder / "report.html"))


def test_every_plot_is_there(full: tuple[Path, Page]) -> None:
    _, page = full
    assert page.titles >= TITLES | ROUTING
    assert sum("expert load" in alt for alt in page.plots) == 2
    assert "could not be drawn" not in page.text
    assert page.open == []  # every tag is closed


def test_nothing_is_fetched_from_anywhere(full: tuple[Path, Page]) -> None:
    _, page = full
    assert page.references
    assert all(reference.startswith("data:") for reference in page.references)
    assert page.tags.isdisjoint({"script", "iframe", "object", "base"})
    for reference in page.references:
        if reference.startswith("data:image/svg+xml;base64,"):
            svg = base64.b64decode(reference.split(",", 1)[1]).decode()
            assert not re.search(r"""(href|src)=["'](?!#|data:)""", svg)
            assert "<script" not in svg


def test_figures_samples_and_settings_are_shown(full: tuple[Path, Page]) -> None:
    folder, page = full
    run = read_runs([folder])[0]
    shown = ("finished", f"{run.last('val/bits_per_byte'):.4f}", "22,600,000 (22.6 M)", "9,400,000 (9.4 M)")
    for text in (*shown, "54 s", "9,102", "wiki_fr", "num_experts: 7", "x --y '<script>'", "a<b>&$x$"):
        assert text in page.text
    assert "</pre><script>alert(1)</script> & text" in page.text


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    moe = make_run(tmp_path / "moe", steps=30, experts=5)
    dense = make_run(tmp_path / "_dense", steps=20, planned=90, layers=(), finished=False, seed=3)
    page = Page(write_report([moe, dense], tmp_path / "out" / "both.html"))
    assert "stopped: SIGTERM" in page.text
    assert "20 of 90" in page.text
    assert "What differs" in page.text
    assert page.titles >= TITLES | ROUTING
    assert "could not be drawn" not in page.text


def test_a_broken_run_still_has_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "broken", steps=10, layers=(0, 1))
    (run / "summary.json").unlink()
    (run / "config.yaml").unlink()
    rows = [
        {"step": s, "train/loss": float("nan"), "moe/0/max_load": 1e9, "val/loss": None} for s in (11, 12)
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 13, "trai')
    (run / "load.jsonl").write_text(
        '{"step": 1, "load": [[NaN, 1], [1, 0]]}\n{"step": 2, "load": [[1, 0], [1, 0]]}'
    )
    page = Page(write_report([run], run / "report.html"))
    assert "unfinished" in page.text
    assert "config.yaml is missing" in page.text
    assert "metrics.jsonl: 1 unreadable line was skipped" in page.text
    assert "4 values NaN or infinite: not drawn" in page.text
    assert "could not be drawn" not in page.text


def test_a_run_without_a_step_has_a_page_and_no_empty_plots(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {}\n")
    page = Page(write_report([tmp_path], tmp_path / "report.html"))
    assert "Nothing to plot yet" in page.text
    assert page.plots == []


def test_without_matplotlib_the_tables_stand_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "x", steps=4)
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(write_report([run], run / "report.html"))
    assert page.plots == []
    assert "pip install 'moetrain[plot]'" in page.text
    assert "Validation bits per byte" in page.text


@pytest.mark.parametrize("taken", ["folder", "parent is a file"])
def test_an_unwritable_target_is_one_line_and_leaves_nothing(tmp_path: Path, taken: str) -> None:
    run = tmp_path / "x"
    for folder in (run, tmp_path / "blocked"):
        folder.mkdir()
    (run / "config.yaml").write_text("a: 1\n")
    (tmp_path / "file").write_text("")
    out = tmp_path / "blocked" if taken == "folder" else tmp_path / "file" / "report.html"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="report: cannot write"):
        write_report([run], out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1\n")
    out = tmp_path / "report.html"
    out.write_text("old")
    write_report([tmp_path], out)
    assert "old" not in out.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "report.html"]


def test_headline_leaves_out_what_no_run_has(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", steps=3)
    (run / "summary.json").write_text('{"finished": true, "params_total": 0.0}')
    (run / "environment.json").write_text('{"params_active": 17}')
    table = dict(row for row in headline(read_runs([run])))
    assert "Forward FLOPs per token" not in table
    assert table["Parameters"] == "0"
    assert table["Active parameters per token"] == "17"
    assert table["Training time"] == "2 s"  # from the rows' times


def test_status_tells_the_three_ends_apart(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", steps=1)
    states = []
    for text in ('{"finished": true}', '{"finished": false, "reason": "STOP file"}', "{}"):
        (run / "summary.json").write_text(text)
        states.append(status(read_runs([run])[0]))
    assert states == ["finished", "stopped: STOP file", "unfinished: still running, or interrupted"]


def test_config_differences_name_nested_keys(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", steps=1, experts=3), make_run(tmp_path / "b", steps=1, experts=5)
    table = config_differences(read_runs([a, b]))
    assert table == [["Config key", "a", "b"], ["model.num_experts", "3", "5"]]
    assert config_differences(read_runs([a, a])) == []


def test_numbers_in_words() -> None:
    assert whole(1234567.0) == "1,234,567 (1.23 M)"
    assert whole(float("nan")) == "-"
    assert [duration(s) for s in (42.2, 185, 7620)] == ["42 s", "3 min 05 s", "2 h 07 min"]


def test_alarms_are_listed_with_what_may_help(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=20)
    raised = {
        "alarm": "collapse",
        "raised": True,
        "why": "1.0 of 7 <experts>",
        "suggestion": "balance=aux_free",
    }
    write_lines(
        run / "alarms.jsonl",
        [
            {"step": 7, "layers": [1, 3], **raised},
            {"step": 9, "alarm": "loss_spike", "raised": True, "layers": [], "why": "7", "suggestion": None},
            {"step": 11, "alarm": "collapse", "raised": False, "layers": [3], "why": "", "suggestion": None},
        ],
    )
    with (run / "alarms.jsonl").open("a") as file:
        file.write("half a li")
    data = read_run(run)
    assert alarm_table([data])[1:] == [
        ["7", "collapse", "layer 1", "1.0 of 7 <experts>", "balance=aux_free", "-"],
        ["7", "collapse", "layer 3", "1.0 of 7 <experts>", "balance=aux_free", "11"],
        ["9", "loss_spike", "the run", "7", "-", "-"],
    ]
    page = render([data])
    assert "<h2>Alarms</h2>" in page
    assert "1.0 of 7 &lt;experts&gt;" in page
    assert "<h2>Alarms</h2>" not in render([read_run(make_run(tmp_path / "quiet", steps=5))])
