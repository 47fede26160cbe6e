"""The training loop: steps, evaluation, checkpoints, stopping, and what to do about a broken step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moetrain.config.schema import CheckpointConfig, LoopConfig, OnNonFinite, ScheduleConfig
from moetrain.errors import TrainingError
from moetrain.train.checkpoint import Checkpointer
from moetrain.train.metrics import load_every, step_row
from moetrain.train.optim import set_lr
from moetrain.train.progress import Progress
from moetrain.train.run_dir import RunDir
from moetrain.train.schedule import lr_factor
from moetrain.train.state import TrainState
from moetrain.train.step import StepResult, TrainStep
from moetrain.train.stopping import StopFlag
from moetrain.train.trackers import Tracker

Evaluate = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Surroundings:
    """Where a loop reports to, and what tells it to stop."""

    run_dir: RunDir
    checkpointer: Checkpointer
    tracker: Tracker
    progress: Progress
    stop: StopFlag


class Loop:
    """Runs ``train.steps`` steps from wherever the state stands."""

    def __init__(
        self,
        state: TrainState,
        step: TrainStep,
        evaluate: Evaluate,
        around: Surroundings,
        cfg: LoopConfig,
        checkpoint: CheckpointConfig,
        schedule: ScheduleConfig,
    ) -> None:
        self.state, self.step, self.evaluate, self.around = state, step, evaluate, around
        self.cfg, self.checkpoint, self.schedule = cfg, checkpoint, schedule
        self._load_every = load_every(cfg.steps)

    def run(self) -> bool:
        """True when all steps are done, False when it was asked to stop before. The state is saved in both."""
        state, around = self.state, self.around
        state.meter.start()
        while state.step < self.cfg.steps:
            self._one_step()
            if around.stop.agree():
                break
            self._between_steps()
        finished = state.step >= self.cfg.steps
        if finished:
            self._evaluate()
        self._save()
        around.checkpointer.wait()
        return finished

    def _one_step(self) -> None:
        state = self.state
        batches = state.loader.next_step()
        if state.step in state.skipped:  # after a rollback: the batch that broke the run is left out
            state.step += 1
            return
        factor = lr_factor(self.schedule, state.step)
        set_lr(state.optimizer, factor)
        result = self.step.run(state.step, batches)
        if result.problem is not None and self._rolled_back(result):
            return
        state.step += 1
        state.tokens += result.tokens
        self._report(result, state.optimizer.param_groups[0]["peak_lr"] * factor)

    def _report(self, result: StepResult, lr: float) -> None:
        state, around = self.state, self.around
        row = step_row(
            step=state.step,
            tokens=state.tokens,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            tokens_per_second=state.meter.step(result.tokens),
            routing=result.routing,
            aux=result.aux,
        )
        around.run_dir.metrics.append(row)
        if result.routing.layers and (state.step % self._load_every == 0 or state.step == self.cfg.steps):
            around.run_dir.load.append(result.routing.load_row(state.step))
        around.tracker.log(row, state.step)
        around.progress.step(row)

    def _between_steps(self) -> None:
        state, every = self.state, self.cfg.eval_every
        if state.step >= self.cfg.steps:
            return
        if every and state.step % every == 0:
            self._evaluate()
        if self.checkpoint.every and state.step % self.checkpoint.every == 0:
            self._save()

    def _evaluate(self) -> None:
        with self.state.meter.paused():
            row = self.evaluate()
        self.around.run_dir.metrics.append(row)
        self.around.tracker.log(row, self.state.step)
        self.around.progress.evaluation(row)

    def _save(self) -> None:
        with self.state.meter.paused():
            self.state.save(self.around.checkpointer)

    def _rolled_back(self, result: StepResult) -> bool:
        """Deal with a withheld update as ``train.on_nonfinite`` says; True where the state was reloaded."""
        state, around, policy = self.state, self.around, self.cfg.on_nonfinite
        good = around.checkpointer.latest_valid()
        what = f"step {state.step + 1}: {result.problem}"
        if policy is OnNonFinite.skip:
            around.progress.say(f"{what}; update skipped (train.on_nonfinite=skip)")
            return False
        if policy is OnNonFinite.rollback and good is not None:
            bad = (*state.skipped, state.step)
            state.load(around.checkpointer, good)
            state.skipped = bad
            around.run_dir.truncate_after(state.step)
            around.progress.say(f"{what}; back to {good}, and step {bad[-1] + 1}'s batch is left out")
            return True
        size = state.loader.samples // (state.step + 1)
        raise TrainingError(
            f"{what}; samples {state.step * size} to {(state.step + 1) * size - 1} of the run's order; "
            f"last good checkpoint: {good or 'none yet'}; lower optim.lr, or set train.on_nonfinite=skip or rollback"
        )
