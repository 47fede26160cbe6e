"""Sweeps that train for real."""

import signal

import pytest
import tiny

from moetrain.cli import main
from moetrain.config.hydra.compose import load_yaml
from moetrain.errors import STOPPED

TINY = [
    "model.d_model=16",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.num_experts=3",
    "model.d_ff_expert=8",
    "data.tokenizer.kind=bytes",
    "data.seq_len=16",
    "train.micro_batch_size=2",
    "train.global_batch_tokens=32",
    "train.steps=2",
    "schedule.horizon=2",
    "schedule.warmup_steps=1",
    "train.device=cpu",
    "train.sample_tokens=2",
    "train.threads=1",
    "train.eval_samples=2",
]


@pytest.mark.real
def test_a_sweep_that_trains_for_real(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i}: " + "some words to learn. " * 9)
    line = [
        "train",
        "-m",
        *TINY,
        "data=local",
        f"data.path={tmp_path}/text",
        f"data.cache_dir={tmp_path}/cache",
    ]
    assert main([*line, "data.val_fraction=0.2", f"run.dir={tmp_path}/sweep", "train.seed=0,1"]) == 0
    for num in (0, 1):
        folder = tmp_path / "sweep" / f"job{num}"
        assert load_yaml(folder / "config.yaml").train.seed == num
        assert (folder / "metrics.jsonl").stat().st_size > 0
        assert (folder / "report.html").exists()


@pytest.mark.real
def test_a_sweep_that_is_asked_to_stop_begins_no_further_job(faulty, corpus, tmp_path, capsys):
    folder = tmp_path / "sweep"
    sweep = ["train", "-m", *tiny.command(corpus, folder)[1:], "router.top_k=1,2", "train.steps=4"]
    sweep += [*faulty, "checkpoint.every=2"]
    with tiny.alone():
        assert main([*sweep, "router.at_step=1", f"router.signal={int(signal.SIGINT)}"]) == STOPPED
    said = capsys.readouterr().out
    assert f"the sweep stopped in job 0; the same command with run.dir={folder} goes on" in said
    assert not (folder / "job1").exists()
    assert len(tiny.steps(folder / "job0")) == 2
    with tiny.alone():
        assert main(sweep) == 0
    assert [len(tiny.steps(folder / f"job{num}")) for num in (0, 1)] == [4, 4]
