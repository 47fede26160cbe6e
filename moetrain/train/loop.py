"""The training loop: steps, evaluation, checkpoints, stopping, and what to do about a broken step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.options import CheckpointConfig
from moetrain.checkpoint.read import step_folder
from moetrain.errors import TrainingError
from moetrain.parallel.distributed import broadcast_object, is_main
from moetrain.parallel.watchdog.flight_recorder import at, patiently
from moetrain.train.alarms import StepFigures
from moetrain.train.log.jsonl import last_row
from moetrain.train.log.metrics import load_every, step_row
from moetrain.train.log.progress import Progress
from moetrain.train.log.tracker import Tracker
from moetrain.train.optim.options import ScheduleConfig
from moetrain.train.optim.schedule import lr_factor
from moetrain.train.options import LoopConfig, OnNonFinite
from moetrain.train.run_dir import RunDir
from moetrain.train.state import TrainState
from moetrain.train.step import StepResult, TrainStep
from moetrain.train.stopping import StopFlag

Evaluate = Callable[[], dict[str, Any]]

_MAX_IN_A_ROW = 10  # broken steps, one after the other, that skip or rollback bear with


@dataclass(frozen=True)
class RunServices:
    """What a loop writes to, and what stops it."""

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
        services: RunServices,
        cfg: LoopConfig,
        checkpoint: CheckpointConfig,
        schedule: ScheduleConfig,
    ) -> None:
        self.state, self.step, self.evaluate, self.services = state, step, evaluate, services
        self.cfg, self.checkpoint, self.schedule = cfg, checkpoint, schedule
        self._load_every = load_every(cfg.steps)
        self._broken_in_a_row = 0
        self._told: int | None = None  # the step of the checkpoint that the tracker knows
        self._evaluated = -1  # the last step that was evaluated

    def run(self) -> bool:
        """True when all steps are done, False when it was asked to stop before; saves the state in both."""
        state, services = self.state, self.services
        self._catch_up()
        state.start(self.cfg.seed)
        state.meter.start()
        while state.step < self.cfg.steps:
            self._one_step()
            if services.stop.agree():
                break
            self._between_steps()
        finished = state.step >= self.cfg.steps
        if finished and self._evaluated != state.step:
            self._evaluate()
        self._save()
        with patiently("saving a checkpoint"):
            services.checkpointer.wait()
        self._tell_saved()
        return finished

    def _catch_up(self) -> None:
        """Evaluate where the run stands, if that is due and was not done.

        It is due before the first step by ``train.eval_first``; and a run that was asked to stop when one was
        due saved without it.
        """
        state, metrics = self.state, self.services.run_dir.metrics.path
        last = last_row(metrics, "val/loss") if is_main() else None
        there = last is not None and last.get("step") == state.step
        if broadcast_object(there):
            self._evaluated = state.step
        elif self._evaluation_is_due():
            self._evaluate()

    def _one_step(self) -> None:
        state = self.state
        at(f"step {state.step + 1}")
        first_sample = state.loader.samples
        batches = state.loader.next_step()
        if state.step in state.skipped:  # after a rollback: the batch that broke the run is left out
            state.step += 1
            return
        lr = state.engine.set_lr(lr_factor(self.schedule, state.step))
        result = self.step.run(state.step, batches)
        if result.problem is None:
            self._broken_in_a_row = 0
        elif self._rolled_back(result, range(first_sample, state.loader.samples)):
            return
        state.step += 1
        state.tokens += result.tokens
        self._report(result, lr)

    def _report(self, result: StepResult, lr: float) -> None:
        state, services = self.state, self.services
        row = step_row(
            step=state.step,
            tokens=state.tokens,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            tokens_per_second=state.meter.step(result.tokens),
            routing=result.routing,
            aux=result.aux,
            control=result.control,
            ahead=result.ahead,
        )
        services.run_dir.metrics.append(row)
        loads = None
        if result.routing.layers and (state.step % self._load_every == 0 or state.step == self.cfg.steps):
            loads = result.routing.load()
            services.run_dir.load.append(result.routing.load_row(state.step))
        self._watch(StepFigures.of(row, result.routing))
        services.tracker.log(row, state.step, loads)
        services.progress.step(row)
        for line in result.messages:
            services.progress.say(line)

    def _watch(self, figures: StepFigures) -> None:
        """Say and record what went wrong with this step, or is over; rank 0's to do."""
        state, services = self.state, self.services
        if state.alarms is None or not is_main():
            return
        for event in state.alarms.observe(figures):
            services.run_dir.alarms.append(event.row())
            services.progress.say(event.line())
            if event.raised:
                title = f"{event.alarm} in {services.run_dir.path.name}"
                services.tracker.alert(title, event.line(), state.step)

    def _between_steps(self) -> None:
        state = self.state
        if state.step >= self.cfg.steps:
            return
        if self._evaluation_is_due():
            self._evaluate()
        if self.checkpoint.every and state.step % self.checkpoint.every == 0:
            self._save()

    def _evaluation_is_due(self) -> bool:
        step, every = self.state.step, self.cfg.eval_every
        due = every > 0 and step % every == 0 if step else self.cfg.eval_first
        return due and step != self._evaluated

    def _evaluate(self) -> None:
        self._evaluated = self.state.step
        at(f"evaluation after step {self.state.step}")
        with self.state.meter.paused():
            row = self.evaluate()
        self.services.run_dir.metrics.append(row)
        self.services.tracker.log(row, self.state.step)
        self.services.progress.evaluation(row)

    def _save(self) -> None:
        at(f"after step {self.state.step}")
        with self.state.meter.paused(), patiently("saving a checkpoint"):
            self.state.save(self.services.checkpointer)
        self._tell_saved()

    def _tell_saved(self) -> None:
        """Name the newest complete checkpoint to the tracker; one under way is named after the next."""
        checkpointer = self.services.checkpointer
        step = checkpointer.last_saved
        if step is not None and step != self._told:
            self._told = step
            self.services.tracker.checkpoint(step_folder(checkpointer.dir, step), step)

    def _rolled_back(self, result: StepResult, samples: range) -> bool:
        """Deal with a broken step as ``train.on_nonfinite`` says; True where the state was reloaded."""
        state, services, policy = self.state, self.services, self.cfg.on_nonfinite
        what = f"step {state.step + 1}: {result.problem}"
        in_a_row = self._count_in_a_row()
        if policy is OnNonFinite.skip and not result.applied and in_a_row <= _MAX_IN_A_ROW:
            services.progress.say(f"{what}; update skipped (train.on_nonfinite=skip)")
            return False
        with patiently("looking for a checkpoint"):
            good = services.checkpointer.latest_valid()
        if policy is OnNonFinite.rollback and good is not None and in_a_row <= _MAX_IN_A_ROW:
            bad = (*state.skipped, state.step)
            with patiently("loading a checkpoint"):
                state.load(services.checkpointer, good)
            state.skipped, self._evaluated = bad, state.step  # its evaluation, if due, was before its save
            services.run_dir.truncate_after(state.step)
            services.progress.say(f"{what}; back to {good}, and step {bad[-1] + 1}'s batch is left out")
            return True
        again = f"; {in_a_row} broken steps in a row" if in_a_row > 1 else ""
        hint = ", or set train.on_nonfinite=skip or rollback" if policy is OnNonFinite.stop else ""
        raise TrainingError(
            f"{what}; samples {samples[0]} to {samples[-1]} of the run's order{again}; "
            f"last good checkpoint: {good or 'none yet'}; lower optim.lr{hint}"
        )

    def _count_in_a_row(self) -> int:
        """The broken steps that end with this one, those before it that a rollback left out included."""
        self._broken_in_a_row += 1
        earlier = self.state.step
        while earlier - 1 in self.state.skipped:
            earlier -= 1
        return max(self._broken_in_a_row, self.state.step - earlier + 1)
