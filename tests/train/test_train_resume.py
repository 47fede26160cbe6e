"""An interrupted run continues bit for bit: rows, evaluations, weights, optimizer, data position, bias.

A killed process is stood in for by a copy of a run folder with its later checkpoints removed; processes that
are really killed are in tests/launch.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny

from moetrain.checkpoint import format as checkpoint_format
from moetrain.checkpoint import manifest as checkpoint_manifest

pytestmark = pytest.mark.usefixtures("training")

VARIANTS = {
    "bias": ["balance=aux_free", "balance.controllers.bias.rate=0.05", "router.score=sigmoid"],
    "quantile": ["balance=quantile", "router=sigmoid"],
    "phi": ["balance=phi"],
    "running": ["balance=running"],
    "follower": ["router=blockffn", "balance=blockffn"],
    "muon": ["optim=muon"],
    "adamw_8bit": ["optim=adamw_8bit", "optim.min_8bit_size=100"],
    "capacity": ["router=switch", "router.capacity_factor=1.0", "router.drop_order=random"],
    "accumulation": [f"train.global_batch_tokens={2 * tiny.BATCH * tiny.SEQ}", "schedule=wsd"],
    "fp64": ["train.precision=fp64", "balance=sequence"],
    "bf16": ["train.precision=bf16", "train.recompute=true"],
    "dense": ["model.num_experts=0", "balance=none", "schedule=constant"],
    "async": ["checkpoint.async_save=true"],
}


def interrupted(run: Path, copy: Path, step: int) -> Path:
    """A copy of ``run`` as a kill would have left it whose newest checkpoint is ``step``'s."""
    shutil.copytree(run, copy)
    for later in tiny.checkpoints(copy):
        if later > step:
            shutil.rmtree(tiny.checkpoint(copy, later))
    for late in ("summary.json", "report.html"):
        (copy / late).unlink()
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "tok')  # it died while writing a row
    return copy


def assert_same_run(one: Path, other: Path) -> None:
    assert tiny.steps(one) == tiny.steps(other)
    assert tiny.evaluations(one) == tiny.evaluations(other)
    assert (one / "load.jsonl").read_text() == (other / "load.jsonl").read_text()
    assert (one / "samples" / "step_00000012.txt").read_bytes() == (
        other / "samples" / "step_00000012.txt"
    ).read_bytes()
    tiny.assert_same_state(tiny.checkpoint(one, tiny.STEPS), tiny.checkpoint(other, tiny.STEPS))


@pytest.mark.parametrize("step", [5, 10])
def test_a_killed_run_continues_bit_for_bit(step, corpus, trained, tmp_path, capsys):
    run = interrupted(trained, tmp_path / "run", step)
    assert tiny.train(corpus, run, *tiny.TRAINED) == 0
    assert f"step_{step:08d}: {step} steps done" in capsys.readouterr().out
    assert_same_run(run, trained)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_state_continues_bit_for_bit(variant, corpus, tmp_path):
    if variant == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: bitsandbytes)")
    whole = tmp_path / "whole"
    options = [*tiny.TRAINED, *VARIANTS[variant]]
    assert tiny.train(corpus, whole, *options) == 0
    run = tmp_path / "run"
    if variant in ("bias", "running"):  # state that a fresh run lacks must matter
        tensors, _ = tiny.contents(tiny.checkpoint(whole, 5))
        name = (
            "model.blocks.1.feed_forward.router.bias_E" if variant == "bias" else "controller.running_load.1"
        )
        assert len(set(tensors[name].flatten().tolist())) > 1
    interrupted(whole, run, 5) if (whole / "load.jsonl").exists() else _dense(whole, run)
    assert tiny.train(corpus, run, *options) == 0
    if variant == "dense":
        assert tiny.steps(run) == tiny.steps(whole)
        tiny.assert_same_state(tiny.checkpoint(run, tiny.STEPS), tiny.checkpoint(whole, tiny.STEPS))
    else:
        assert_same_run(run, whole)


def _dense(whole: Path, run: Path) -> None:
    interrupted(whole, run, 5)


def test_grown_steps_are_the_run_that_was_longer_from_the_start(corpus, trained, tmp_path):
    run = tmp_path / "run"
    for steps in (4, 7, 12):
        assert tiny.train(corpus, run, *tiny.TRAINED, f"train.steps={steps}") == 0
        assert tiny.summary(run)["steps"] == steps
    assert tiny.steps(run) == tiny.steps(trained)
    tiny.assert_same_state(tiny.checkpoint(run, 12), tiny.checkpoint(trained, 12))
    assert len((run / "environment.json").read_text().split('"argv"')) == 4  # all three starts


@pytest.mark.real
def test_moments_may_change_between_32_and_8_bits(corpus, trained, tmp_path, capsys):
    """A change of the optimizer, which is to be named; names, shapes and dtypes are the same."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: bitsandbytes)")
    eight, accepted = ["optim=adamw_8bit", "optim.min_8bit_size=100"], "resume_changes=[optim]"
    run = interrupted(trained, tmp_path / "run", 5)
    assert tiny.train(corpus, run, *tiny.TRAINED, *eight) == 2
    assert "optim.name=adamw, and now optim.name=adamw_8bit" in capsys.readouterr().err
    assert tiny.train(corpus, run, *tiny.TRAINED, *eight, accepted, "train.steps=10") == 0
    assert tiny.train(corpus, run, *tiny.TRAINED, accepted) == 0
    pairs = list(zip(tiny.steps(run), tiny.steps(trained), strict=True))
    apart = [abs(ours["train/loss"] - theirs["train/loss"]) for ours, theirs in pairs]
    assert apart[:5] == [0] * 5
    assert 0 < max(apart) < 1e-3, max(apart)


def test_a_finished_run_started_again_stays_as_it_is(corpus, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert tiny.train(corpus, run, *tiny.TRAINED) == 0
    assert tiny.steps(run) == tiny.steps(trained)
    assert tiny.evaluations(run) == tiny.evaluations(trained)
    tiny.assert_same_state(tiny.checkpoint(run, 12), tiny.checkpoint(trained, 12))


def test_resume_from_another_runs_checkpoint(corpus, trained, tmp_path):
    run = tmp_path / "run"
    start = tiny.checkpoint(trained, 5)
    assert tiny.train(corpus, run, *tiny.TRAINED, f"resume={start}") == 0
    assert tiny.steps(run) == tiny.steps(trained)[5:]
    tiny.assert_same_state(tiny.checkpoint(run, 12), tiny.checkpoint(trained, 12))


def test_going_back_leaves_the_later_checkpoints_behind(corpus, trained, tmp_path, capsys):
    """Otherwise the next resume=auto would jump forward to steps that this run did not take."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    back = [*tiny.TRAINED, "optim.lr=0.002", "resume_changes=[optim.lr]"]
    start = tiny.checkpoint(run, 5)
    assert tiny.train(corpus, run, *back, f"resume={start}", "train.steps=7") == 0
    assert tiny.checkpoints(run) == [5, 7]
    assert len(list((run / "checkpoints" / "abandoned").iterdir())) == 2
    capsys.readouterr()
    assert tiny.train(corpus, run, *back) == 0
    assert "step_00000007: 7 steps done" in capsys.readouterr().out
    rows = tiny.steps(run)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[:5] == tiny.steps(trained)[:5]
    assert rows[6]["train/loss"] != tiny.steps(trained)[6]["train/loss"]


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(corpus, trained, tmp_path, caplog):
    run = interrupted(trained, tmp_path / "run", 10)
    data = tiny.checkpoint(run, 10) / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert tiny.train(corpus, run, *tiny.TRAINED) == 0
    assert "step_00000010 is damaged and is passed over" in caplog.text
    assert_same_run(run, trained)


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["train.seed=1"], ["train.seed=0", "train.seed=1", "cannot change", "run.name"]),
        (["train.seed=1", "resume_changes=[train.seed]"], ["train.seed=0", "cannot change"]),
        (["data.seq_len=8"], ["data.seq_len=16", "data.seq_len=8", "cannot change"]),
        (["model.norm_eps=0.1"], ["model.norm_eps=1e-05", "=0.1", "resume_changes=[model.norm_eps]"]),
        (["experts.activation=geglu"], ["experts.activation=swiglu", "=geglu"]),
        (["router=noisy_topk"], ["router.name=topk,", "router.name=noisy_topk", "resume_changes=[router"]),
        (["balance=none"], ["balance.losses=set", "balance.losses=[]"]),
        (["optim.lr=0.1", "optim.eps=1e-6"], ["0.001", "0.1", "resume_changes=[optim.lr,optim.eps]"]),
        (["optim.lr=0.1", "optim.eps=1", "resume_changes=[optim.lr]"], ["=[optim.lr,optim.eps]"]),
        (["schedule=constant"], ["schedule.kind=cosine", "schedule.kind=constant"]),
        (["train.global_batch_tokens=128"], ["train.global_batch_tokens=64", "=128"]),
        (["init_optimizer=true", "init_from={trained}"], ["init_from=null", "init_optimizer=false"]),
        (["resume_changes=[optim.lrr]"], ["optim.lrr", "did you mean optim.lr?"]),
        (
            ["model.d_ff_expert=13", "resume_changes=[model.d_ff_expert]"],
            ["of another model or optimizer", "w_gate_up_EDCF", "[5, 16, 2, 12]", "[5, 16, 2, 13]"],
        ),
        (["optim=muon"], ["optim.name=adamw", "optim.name=muon"]),
        (["optim=muon", "resume_changes=[optim]"], ["of another model or optimizer", "momentum"]),
        (["resume=none"], ["resume=none", "3 checkpoint(s)"]),
    ],
    ids=lambda part: " ".join(part) if "=" in part[0] else "",
)
def test_another_run_is_refused_and_nothing_is_touched(
    overrides, fragments, corpus, trained, tmp_path, capsys
):
    overrides = [override.format(trained=trained) for override in overrides]
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = {name: (run / name).read_bytes() for name in tiny.files(run)}
    assert tiny.train(corpus, run, *tiny.TRAINED, "train.steps=20", *overrides) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert not [fragment for fragment in fragments if fragment not in err], err
    assert {name: (run / name).read_bytes() for name in tiny.files(run)} == before


def test_a_run_of_another_format_is_refused(corpus, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as older:
        for module in (checkpoint_format, checkpoint_manifest):
            older.setattr(module, "VERSION", 1)
        assert tiny.train(corpus, run, *tiny.TRAINED) == 0
    before = {name: (run / name).read_bytes() for name in tiny.files(run)}
    capsys.readouterr()
    assert tiny.train(corpus, run, *tiny.TRAINED, "train.steps=20") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert "is of format version 1, and this moetrain reads version 2" in err
    assert {name: (run / name).read_bytes() for name in tiny.files(run)} == before


def test_other_text_is_refused(corpus, trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    other = tmp_path / "other"
    shutil.copytree(corpus / "text", other / "text")
    (other / "text" / "new.txt").write_text("one document more")
    assert tiny.train(other, run, *tiny.TRAINED, "train.steps=20") == 2
    assert "the checkpoint was trained on other data" in capsys.readouterr().err
    assert tiny.steps(run) == tiny.steps(trained)


CHANGED = ["optim.lr=0.01", "resume_changes=[optim.lr,model.norm_eps]"]
QUIET = ["train.steps=14", "checkpoint.every=7", "train.eval_every=7", "train.sample_prompt=x"]


def test_what_changes_on_resume_is_said_and_the_rest_is_quiet(corpus, trained, tmp_path, capsys):
    """Text that lies elsewhere is the same text; the accepted change is in force, and said once."""
    run = interrupted(trained, tmp_path / "run", 5)
    moved = tmp_path / "moved"
    shutil.copytree(corpus / "text", moved / "text")
    said = ["train.micro_batch_size=4", "train.eval_samples=4"]
    assert tiny.train(moved, run, *tiny.TRAINED, *QUIET, *said, *CHANGED) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "changed on" in line or "names" in line]
    assert sorted(lines) == [
        "changed on resume: optim.lr was 0.001, now 0.01 (accepted by resume_changes)",
        "changed on resume: train.eval_samples was 5, now 4",
        "changed on resume: train.micro_batch_size was 2, now 4",
        "resume_changes names model.norm_eps, which is as it was",
    ]
    assert tiny.steps(run)[5]["train/lr"] == pytest.approx(10 * tiny.steps(trained)[5]["train/lr"])
    assert tiny.train(moved, run, *tiny.TRAINED, *QUIET, *said, *CHANGED) == 0  # the same command again
    assert "changed on resume" not in capsys.readouterr().out


def test_a_start_says_that_accepted_changes_have_no_effect(corpus, tmp_path, capsys):
    assert tiny.train(corpus, tmp_path / "run", "train.steps=1", "resume_changes=[optim.lr]") == 0
    assert "resume_changes=[optim.lr] has no effect: this run starts anew" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["missing", "unreadable"])
def test_without_a_config_to_compare(file, corpus, trained, tmp_path, capsys):
    """A missing one is said, since the checkpoint tells the function; one that is no config is refused."""
    run = interrupted(trained, tmp_path / "run", 10)
    config = run / "config.yaml"
    config.unlink()
    if file == "unreadable":
        config.write_text("{")
        assert tiny.train(corpus, run, *tiny.TRAINED) == 2
        assert "restore the file, or remove it" in capsys.readouterr().err
        assert config.read_text() == "{"
        return
    assert tiny.train(corpus, run, *tiny.TRAINED, "model.rope_theta=7.0") == 2
    assert "model.rope_theta was 10000.0, now 7.0" in capsys.readouterr().err
    assert tiny.train(corpus, run, *tiny.TRAINED) == 0
    assert f"there is no {config}" in capsys.readouterr().out
    assert_same_run(run, trained)


def test_an_older_config_lacks_newer_keys(corpus, trained, tmp_path, capsys):
    """They count as their defaults, in the config and in what the checkpoint knows."""
    run = interrupted(trained, tmp_path / "run", 10)
    config = run / "config.yaml"
    kept = [line for line in config.read_text().splitlines() if "rope_theta" not in line]
    config.write_text("\n".join(kept))
    assert tiny.train(corpus, run, *tiny.TRAINED) == 0
    assert "changed" not in capsys.readouterr().out
    assert_same_run(run, trained)
