"""The throughput and the loss monitor."""

from __future__ import annotations

import math

import pytest

from moetrain.train.log.monitor import LossMonitor, ThroughputMeter


def test_throughput_leaves_out_what_is_paused() -> None:
    now = [0.0]
    meter = ThroughputMeter(window=2, clock=lambda: now[0])
    now[0] = 5.0
    meter.start()
    now[0] = 6.0
    assert meter.step(100) == 100.0
    with meter.paused():
        now[0] = 20.0
        with meter.paused():
            now[0] = 26.0
    now[0] = 29.0
    assert meter.step(100) == pytest.approx(200 / 4)
    now[0] = 30.0
    assert meter.step(100) == pytest.approx(200 / 4)  # the first step has left the window
    assert meter.seconds == 5.0
    resumed = ThroughputMeter(clock=lambda: 0.0)
    resumed.load_state_dict(meter.state_dict())
    assert resumed.seconds == 5.0


def test_loss_monitor_names_what_is_not_finite() -> None:
    monitor = LossMonitor()
    assert monitor.check(math.nan) == "the loss is nan"
    assert monitor.check(math.inf) == "the loss is inf"
    assert monitor.check(2.0, grad_norm=math.nan) == "the gradient norm is nan"
    assert monitor.check(2.0, grad_norm=1.0) is None
    assert monitor.check(1e9) is None  # no spike factor


def test_loss_monitor_finds_a_spike_and_does_not_learn_from_it() -> None:
    monitor = LossMonitor(spike_factor=2.0)
    assert all(monitor.check(loss) is None for loss in [40.0] + 9 * [4.0])
    mean = monitor.mean
    message = monitor.check(2.1 * mean)
    assert message is not None
    assert "train.spike_factor=2" in message
    assert monitor.mean == mean
    assert monitor.check(1.9 * mean) is None


def test_loss_monitor_resumes_exactly() -> None:
    losses = [8.0, 7.1, 6.3, 5.9, 5.5, 5.2]
    straight, first, second = LossMonitor(2.0), LossMonitor(2.0), LossMonitor(2.0)
    for loss in losses:
        straight.check(loss)
    for loss in losses[:2]:
        first.check(loss)
    second.load_state_dict(first.state_dict())
    for loss in losses[2:]:
        second.check(loss)
    assert second.state_dict() == straight.state_dict()
    assert LossMonitor().check(3.0) is None
