"""Monitors of a run: its throughput, and whether a step's loss is finite and no spike."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

_WARMUP = 10  # losses before a spike can be told from the first steps' fall


class ThroughputMeter:
    """Tokens per second over the last ``window`` steps; what runs inside :meth:`paused` does not count."""

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._recent: deque[tuple[int, float]] = deque(maxlen=window)
        self._mark = clock()
        self._depth = 0
        self.seconds = 0.0  # spent in steps since the run began, over all resumes
        self.speed: float | None = None  # what the last step returned

    def start(self) -> None:
        """Begin to count now: call it just before the first step."""
        self._mark = self._clock()

    def step(self, tokens: int) -> float:
        """End a step that trained on ``tokens`` tokens (of all ranks); return tokens per second."""
        now = self._clock()
        elapsed, self._mark = now - self._mark, now
        self.seconds += elapsed
        self._recent.append((tokens, elapsed))
        spent = sum(t for _, t in self._recent)
        self.speed = sum(n for n, _ in self._recent) / spent if spent > 0 else 0.0
        return self.speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count: evaluation, checkpoints, sampling. May be nested."""
        before, self._depth = self._clock(), self._depth + 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._mark += self._clock() - before

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.seconds = state["seconds"]


class LossMonitor:
    """Finds a broken step by its loss and gradient norm, which are the same on all ranks.

    The running mean is exponential with ``decay``, bias-corrected, over the losses that passed.
    ``spike_factor`` None: only non-finite values are reported.
    """

    def __init__(self, spike_factor: float | None = None, decay: float = 0.95) -> None:
        self.spike_factor = spike_factor
        self.decay = decay
        self._sum = 0.0
        self._count = 0

    @property
    def mean(self) -> float:
        """The running mean; NaN before the first loss."""
        return self._sum / (1 - self.decay**self._count) if self._count else math.nan

    def check(self, loss: float, grad_norm: float | None = None) -> str | None:
        """What is wrong with the step, as a phrase; None if nothing is, and then the loss enters the mean."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        mean = self.mean
        if self.spike_factor and self._count >= _WARMUP and loss > self.spike_factor * mean:
            return (
                f"the loss {loss:.4g} is {loss / mean:.3g} times its running mean {mean:.4g} "
                f"(train.spike_factor={self.spike_factor:g})"
            )
        self._sum = self.decay * self._sum + (1 - self.decay) * loss
        self._count += 1
        return None

    def state_dict(self) -> dict[str, float]:
        return {"sum": self._sum, "count": self._count}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._sum, self._count = state["sum"], int(state["count"])
