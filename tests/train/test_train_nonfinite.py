"""Steps that break: NaN from a bad sample, weights blown up by a learning rate, a spike of the loss.

The bad sample's NaN is real: a plug-in router multiplies its weights by NaN, and it goes through the model.
"""

from __future__ import annotations

import math
import shutil
import signal

import pytest
import tiny
import torch

from moetrain.errors import STOPPED

SAVED = ["checkpoint.every=3", "checkpoint.keep_last=9", "train.eval_every=2"]
LOST = "last good checkpoint: none yet"


def bad(*samples: int, fault: str = "nan") -> list[str]:
    return [f"router.samples={list(samples)}".replace(" ", ""), f"router.fault={fault}"]


def one_line(capsys) -> str:
    err: str = capsys.readouterr().err
    assert err.startswith("moetrain: error: ")
    assert err.count("\n") == 1, err
    return err


def losses(run) -> dict[int, float | None]:
    return {row["step"]: row["train/loss"] for row in tiny.steps(run)}


def test_stop_names_step_parameter_samples_and_checkpoint(faulty, corpus, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["train.steps=12", *SAVED, *faulty]
    asked = [f"router.signal={int(signal.SIGTERM)}", "router.at_step=1"]
    assert tiny.train(corpus, run, *options, *asked) == STOPPED
    assert (run / "summary.json").exists()
    capsys.readouterr()
    assert tiny.train(corpus, run, *options, *bad(17)) == 1
    assert not (run / "summary.json").exists()  # it is not stopped any more
    err = one_line(capsys)
    parts = ["step 5: the loss is nan", "gradient that is not finite: embed_VD", "samples 16 to 19"]
    parts += [f"last good checkpoint: {tiny.checkpoint(run, 3)}", "train.on_nonfinite=skip or rollback"]
    assert not [part for part in parts if part not in err], err
    assert tiny.checkpoints(run) == [2, 3]
    assert len(tiny.steps(run)) == 4
    # With the fault removed the run goes on as if nothing had been.
    assert tiny.train(corpus, run, *options) == 0
    whole = tmp_path / "whole"
    assert tiny.train(corpus, whole, *options) == 0
    assert tiny.steps(run) == tiny.steps(whole)
    tiny.assert_same_state(tiny.checkpoint(run, 12), tiny.checkpoint(whole, 12))


def test_without_a_checkpoint_the_message_says_so(faulty, corpus, tmp_path, capsys):
    for policy in ("stop", "rollback"):
        run = tmp_path / policy
        assert tiny.train(corpus, run, *faulty, *bad(5), f"train.on_nonfinite={policy}") == 1
        assert LOST in one_line(capsys)
        assert tiny.checkpoints(run) == []


def test_skip_and_rollback_leave_the_bad_batches_out(faulty, corpus, tmp_path, capsys):
    """Both give the same weights: of the steps that went wrong there is no trace but the schedule's."""
    runs = {policy: tmp_path / policy for policy in ("skip", "rollback")}
    for policy, run in runs.items():
        options = ["train.steps=12", *SAVED, *faulty, *bad(17, 34, 37), f"train.on_nonfinite={policy}"]
        assert tiny.train(corpus, run, *options) == 0
        said = capsys.readouterr().out
        for step in (5, 9, 10):
            line = (
                f"step {step}: the loss is nan; first parameter with a gradient that is not finite: embed_VD"
            )
            assert line in said
            assert (f"back to {tiny.checkpoint(run, (step - 1) // 3 * 3)}" in said) == (policy == "rollback")
        assert ("update skipped (train.on_nonfinite=skip)" in said) == (policy == "skip")
        assert ("step 9's batch is left out" in said) == (policy == "rollback")
        assert math.isfinite(tiny.evaluations(run)[-1]["val/loss"])
        assert [row["step"] for row in tiny.evaluations(run)] == [2, 4, 6, 8, 10, 12]
        assert len(tiny.steps(run)) == len(losses(run))  # no row is there twice
    skipped, back = losses(runs["skip"]), losses(runs["rollback"])
    assert [step for step, loss in skipped.items() if loss is None] == [5, 9, 10]
    assert back == {step: loss for step, loss in skipped.items() if loss is not None}
    tensors, extra = tiny.contents(tiny.checkpoint(runs["rollback"], 12))
    there, _ = tiny.contents(tiny.checkpoint(runs["skip"], 12))
    assert all(torch.equal(tensor, there[name]) for name, tensor in tensors.items())
    assert extra["skipped"] == [4, 8, 9]


def test_a_batch_left_out_stays_out_after_a_resume(faulty, corpus, tmp_path, capsys):
    options = ["train.steps=12", *SAVED, *faulty, *bad(17), "train.on_nonfinite=rollback"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert tiny.train(corpus, whole, *options) == 0
    shutil.copytree(whole, run)
    for step in (9, 12):
        shutil.rmtree(tiny.checkpoint(run, step))
    capsys.readouterr()
    assert tiny.train(corpus, run, *options) == 0
    assert "is left out" not in capsys.readouterr().out  # it went on after step 6
    assert tiny.steps(run) == tiny.steps(whole)
    tiny.assert_same_state(tiny.checkpoint(run, 12), tiny.checkpoint(whole, 12))


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_no_policy_goes_on_for_ever(policy, faulty, corpus, tmp_path, capsys):
    """Every batch is bad from the fifth step on: skipping them all is no training."""
    run = tmp_path / "run"
    options = ["train.steps=40", *SAVED, *faulty, *bad(*range(16, 160)), f"train.on_nonfinite={policy}"]
    assert tiny.train(corpus, run, *options) == 1
    err = one_line(capsys)
    assert "step 15: the loss is nan" in err
    assert "11 broken steps in a row" in err


@pytest.mark.parametrize(
    ("policy", "last", "good"), [("stop", 13, 12), ("skip", 13, 12), ("rollback", 23, 20)]
)
def test_an_update_that_breaks_the_weights_is_caught_in_its_step(
    policy, last, good, training, corpus, trained, tmp_path, capsys
):
    """A learning rate beyond fp32: loss and gradient are fine, the weights after the update are not.

    Skipping cannot mend that, and leaving batches out does not help.
    """
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    options = [*tiny.TRAINED, "train.steps=30", "optim.lr=1e39", "schedule=constant"]
    options += ["resume_changes=[optim.lr,schedule]"]
    assert tiny.train(corpus, run, *options, f"train.on_nonfinite={policy}") == 1
    err = one_line(capsys)
    assert f"step {last}: the update made embed_VD not finite" in err
    assert f"last good checkpoint: {tiny.checkpoint(run, good)}" in err
    assert losses(run) == losses(trained)
    newest, _ = tiny.contents(tiny.checkpoint(run, good))
    there, _ = tiny.contents(tiny.checkpoint(trained, 12))
    assert all(torch.equal(tensor, there[name]) for name, tensor in newest.items())


def test_a_spike_is_a_broken_step_too(faulty, corpus, tmp_path, capsys):
    """Finite, but too high for its running mean: the update is withheld as that of a NaN is."""
    spiky = [*faulty, *bad(77, fault="scale"), "checkpoint.every=8", "train.steps=22", "optim.lr=0.02"]
    calm = tmp_path / "calm"
    assert tiny.train(corpus, calm, *spiky) == 0  # without a factor it is a step like any other
    assert losses(calm)[20] > 1.4 * losses(calm)[19]
    spiky.append("train.spike_factor=1.15")
    run = tmp_path / "run"
    capsys.readouterr()
    assert tiny.train(corpus, run, *spiky) == 1
    err = one_line(capsys)
    parts = ["step 20: the loss ", "times its running mean", "train.spike_factor=1.15", "samples 76 to 79"]
    parts.append(f"last good checkpoint: {tiny.checkpoint(run, 16)}")
    assert not [part for part in parts if part not in err], err
    assert "not finite" not in err
    assert tiny.train(corpus, run, *spiky, "train.on_nonfinite=skip") == 0
    assert [losses(run)[step] == losses(calm)[step] for step in (19, 20, 21)] == [True, True, False]
