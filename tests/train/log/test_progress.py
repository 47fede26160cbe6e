"""Plain lines and the bar: what they print, how often, and that they never stop a run."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from moetrain.train.log.progress import (
    BarProgress,
    PlainProgress,
    Progress,
    build_progress,
    evaluation_line,
    short_number,
    short_time,
    step_line,
)


def step_row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "train/loss": 4.5, "tokens_per_second": 12345.0, "moe/3/max_load": 1.25} | more


EVALUATION = {"step": 7, "val/loss": 2.0, "val/perplexity": math.e**2, "val/bits_per_byte": 1.25}


def ticking(seconds: float) -> Callable[[], float]:
    """A clock that goes on by ``seconds`` at every look."""
    now = [0.0]

    def clock() -> float:
        now[0] += seconds
        return now[0]

    return clock


def printed_steps(stream: io.StringIO) -> list[int]:
    return [int(line.split("/")[0].split()[1]) for line in stream.getvalue().splitlines()]


def test_a_step_line() -> None:
    line = step_line(step_row(7, **{"moe/11/max_load": 2.5}), 400, 65.0)
    assert line == "step   7/400  loss 4.5000  12.3k tok/s  eta  1:05  load 2.50x (layer 11)"
    dense = {"step": 7, "train/loss": math.nan, "tokens_per_second": 0.0}
    assert step_line(dense, 400, None) == "step   7/400  loss nan      0 tok/s  eta     -"


def test_an_evaluation_line() -> None:
    assert evaluation_line(EVALUATION, 40) == "step  7/40  val loss 2.0000  perplexity 7.39  bits/byte 1.2500"


def test_a_fast_run_prints_its_first_step_and_each_twentieth() -> None:
    stream = io.StringIO()
    progress = PlainProgress(101, clock=ticking(0.001), stream=stream)
    for step in range(1, 102):
        progress.step(step_row(step))
    assert printed_steps(stream) == [1, *range(5, 101, 5), 101]


def test_a_slow_run_prints_every_thirty_seconds() -> None:
    stream = io.StringIO()
    progress = PlainProgress(1000, clock=ticking(5.5), stream=stream)  # two looks a step
    for step in range(1, 12):
        progress.step(step_row(step))
    assert printed_steps(stream) == [1, 4, 7, 10]


def test_a_resumed_run_prints_its_first_step() -> None:
    stream = io.StringIO()
    progress = PlainProgress(1000, done=640, clock=ticking(0.001), stream=stream)
    progress.step(step_row(641))
    progress.step(step_row(642))
    assert printed_steps(stream) == [641]


def test_time_left_follows_the_recent_pace() -> None:
    progress = Progress(100, done=40, clock=ticking(2.0))
    assert progress.remaining() is None
    for step in range(41, 91):
        progress.step(step_row(step))
    assert progress.remaining() == pytest.approx(2.0 * 10)


def test_a_reader_who_leaves_does_not_stop_the_run() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    progress = PlainProgress(2, stream=Gone())
    progress.step(step_row(1))
    progress.evaluation(EVALUATION)


def test_text_that_the_stream_cannot_write_is_replaced() -> None:
    raw = io.BytesIO()
    progress = PlainProgress(2, stream=io.TextIOWrapper(raw, encoding="ascii"))
    progress.say("naïve \x1b[31m\x00 text\n\tnext")
    assert raw.getvalue() == b"na?ve ?[31m? text\n\tnext\n"


def run_bar(width: int, steps: int = 3) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, height=20, legacy_windows=False)
    with BarProgress(400, clock=ticking(1.0), console=console) as progress:
        for step in range(1, steps + 1):
            progress.step(step_row(step))
        progress.say("[bold] \x1b[2J is no markup")
        progress.evaluation(EVALUATION)
    return stream.getvalue()


def test_the_bar_shows_the_figures() -> None:
    text = run_bar(100)
    for part in ("3/400", "loss 4.5000", "12.3k tok/s", "eta  6:37", "load 1.25x (layer 3)"):
        assert part in text
    assert "val loss 2.0000" in text
    assert "[bold] \N{REPLACEMENT CHARACTER}[2J is no markup" in text


@pytest.mark.parametrize(
    ("width", "shown", "hidden"), [(80, "load", "…"), (50, "tok/s", "load"), (34, "loss", "tok/s")]
)
def test_a_narrow_terminal_shows_fewer_figures_whole(width: int, shown: str, hidden: str) -> None:
    text = run_bar(width)
    assert shown in text
    assert hidden not in text
    assert "3/400" in text


def test_only_rank_0_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # asks for colours, not for a bar in a file
    with build_progress(4, rank=1) as silent:
        silent.step(step_row(1))
        silent.evaluation(EVALUATION)
        silent.say("text")
    assert capsys.readouterr().out == ""
    with build_progress(4, rank=0) as progress:  # the captured output is no terminal
        assert isinstance(progress, PlainProgress)
        progress.step(step_row(1))
    assert capsys.readouterr().out.startswith("step 1/4  loss")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (949.6, "950"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (12345, "12.3k"),
        (123456, "123k"),
        (1.05e6, "1.05M"),
    ],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (42.4, "42s"),
        (59.7, "1:00"),
        (185, "3:05"),
        (7629, "2:07:09"),
        (3 * 86400 + 4 * 3600, "3d04h"),
    ],
)
def test_short_times(seconds: float | None, text: str) -> None:
    assert short_time(seconds) == text
