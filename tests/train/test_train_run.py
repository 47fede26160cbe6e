"""Whole runs of a tiny model: what they leave, what they learn, and what can be done with it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import tiny
import torch

from moetrain.cli import main
from moetrain.config.checked import checked
from moetrain.config.hydra.compose import load_yaml
from moetrain.data import prepare
from moetrain.moe.routers.topk import TopKRouter
from moetrain.train.log.jsonl import read_metrics
from moetrain.train.log.metrics import key_pattern
from moetrain.train.run import train

pytestmark = pytest.mark.usefixtures("training")
DOCUMENTED = Path(__file__).parents[2] / "docs" / "metrics.md"


def documented_keys(heading: str) -> set[str]:
    section = DOCUMENTED.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))


def test_a_run_from_start_to_end(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()  # this one draws its report
    run = tmp_path / "run"
    steps = ["train.steps=30", "checkpoint.every=10", "checkpoint.keep_last=2", "train.eval_every=15"]
    assert tiny.train(corpus, run, "optim.lr=0.01", "schedule.horizon=30", *steps) == 0
    said = capsys.readouterr().out
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "config.yaml", "environment.json", "load.jsonl", "metrics.jsonl", "ranks",
        "report.html", "samples", "summary.json", "tokenizer",
    ]  # fmt: skip
    assert [row["step"] for row in tiny.steps(run)] == list(range(1, 31))
    assert [row["step"] for row in tiny.evaluations(run)] == [15, 30]
    assert tiny.checkpoints(run) == [20, 30]
    assert [row["tokens"] for row in tiny.steps(run)] == [64 * n for n in range(1, 31)]
    losses = [row["train/loss"] for row in tiny.steps(run)]
    assert losses[0] == pytest.approx(math.log(257), abs=0.1)
    assert sum(losses[-5:]) / 5 < losses[0] - 1
    evaluation = tiny.evaluations(run)[-1]
    assert evaluation["val/loss"] < losses[0] - 1
    assert evaluation["val/perplexity"] == pytest.approx(math.exp(evaluation["val/loss"]))
    # one token is one byte, but for the end of a document, which is scored and stands for no byte
    assert evaluation["val/bits_per_byte"] == pytest.approx(evaluation["val/loss"] / math.log(2), rel=0.05)
    assert f"{evaluation['val/bits_per_byte']:.4f} bits per byte" in said
    summary = tiny.summary(run)
    assert (summary["steps"], summary["tokens"], summary["finished"]) == (30, 1920, True)
    assert summary["val/bits_per_byte"] == evaluation["val/bits_per_byte"]
    assert summary["tokens_per_second"] == pytest.approx(1920 / summary["seconds"], rel=0.2)
    sample = (run / "samples" / "step_00000030.txt").read_text()
    assert sample.startswith("def ")
    assert "<h1>run</h1>" in (run / "report.html").read_text()
    assert json.loads((run / "environment.json").read_text())["seed"] == 0


def test_keys_and_documented_keys_are_the_same(trained):
    rows = read_metrics(trained)
    keys = {kind: {k for row in rows if f"{kind}/loss" in row for k in row} for kind in ("train", "val")}
    of_controllers = {key for key in documented_keys("Rows of a step") if key.startswith("balance/")}
    not_here = of_controllers | {"train/loss_future_<depth>"}
    assert {key_pattern(key) for key in keys["train"]} == documented_keys("Rows of a step") - not_here
    of_other_routers = {"val/loss_<mode>"}
    documented = documented_keys("Rows of an evaluation")
    assert {key_pattern(key) for key in keys["val"]} == documented - of_other_routers
    assert {key for key in keys["train"] if "aux" in key} == {
        f"moe/{layer}/aux/{loss}" for layer in (0, 1) for loss in ("switch_global_batch", "z")
    }


@pytest.mark.parametrize(
    ("overrides", "layers"),
    [
        (["model.num_layers=4", "model.moe_every=2"], [1, 3]),
        (["model.num_layers=3", "model.first_dense=1"], [1, 2]),
        (["model.num_shared_experts=2"], [0, 1]),
        (["model.num_experts=0", "balance=none"], []),
        (["model.num_experts=1"], [0, 1]),
    ],
)
def test_where_the_experts_are(overrides, layers, corpus, tmp_path):
    """A model is MoE in all layers, every second, all but the first, with shared experts, or not at all."""
    run = tmp_path / "run"
    assert tiny.train(corpus, run, "train.steps=4", "optim.lr=0.01", *overrides) == 0
    rows = tiny.steps(run)
    assert rows[3]["train/loss"] < rows[0]["train/loss"] - 0.05
    counted = {int(key.split("/")[1]) for key in rows[0] if key.startswith("moe/")}
    assert sorted(counted) == layers
    assert all(row[f"moe/{i}/experts_per_token"] <= 2 for row in rows for i in layers)
    loads = [json.loads(line) for line in (run / "load.jsonl").read_text().splitlines()] if layers else []
    assert [row["layers"] for row in loads] == [layers] * len(rows) * bool(layers)
    summary = tiny.summary(run)
    assert (summary["params_total"] > summary["params_active"]) == bool(layers and "=1" not in overrides[0])


def test_recompute_changes_no_bit_of_the_run(corpus, trained, tmp_path, monkeypatch):
    calls = []
    route = TopKRouter.route
    monkeypatch.setattr(TopKRouter, "route", lambda *args: calls.append(args) or route(*args))
    assert tiny.train(corpus, tmp_path / "short", "train.steps=1") == 0
    once = len(calls)
    assert tiny.train(corpus, tmp_path / "again", "train.steps=1", "train.recompute=true") == 0
    assert len(calls) - once == once + 2 * tiny.BATCH // tiny.MICRO  # both layers, for every backward pass
    run = tmp_path / "run"
    assert tiny.train(corpus, run, *tiny.TRAINED, "train.recompute=true") == 0
    assert tiny.steps(run) == tiny.steps(trained)
    assert tiny.evaluations(run) == tiny.evaluations(trained)
    tiny.assert_same_state(tiny.checkpoint(run, tiny.STEPS), tiny.checkpoint(trained, tiny.STEPS))


def test_evaluating_saving_and_sampling_change_no_bit(corpus, trained, tmp_path):
    run = tmp_path / "run"
    often = [
        "train.eval_every=1",
        "checkpoint.every=1",
        "checkpoint.async_save=true",
        "checkpoint.keep_last=2",
    ]
    assert tiny.train(corpus, run, f"train.steps={tiny.STEPS}", *often) == 0
    assert tiny.steps(run) == tiny.steps(trained)
    assert tiny.checkpoints(run) == [tiny.STEPS - 1, tiny.STEPS]
    tiny.assert_same_state(tiny.checkpoint(run, tiny.STEPS), tiny.checkpoint(trained, tiny.STEPS))


@pytest.mark.parametrize(
    ("precision", "stored", "apart"),
    [("bf16", torch.float32, (1e-5, 0.05)), ("fp64", torch.float64, (1e-9, 1e-4))],
)
def test_precisions(precision, stored, apart, corpus, trained, tmp_path):
    run = tmp_path / "run"
    assert tiny.train(corpus, run, f"train.steps={tiny.STEPS}", f"train.precision={precision}") == 0
    pairs = zip(tiny.steps(run), tiny.steps(trained), strict=True)
    difference = max(abs(a["train/loss"] - b["train/loss"]) for a, b in pairs)
    assert apart[0] < difference < apart[1]
    tensors, _ = tiny.contents(tiny.checkpoint(run, tiny.STEPS))
    kinds = {tensor.dtype for name, tensor in tensors.items() if name.endswith(("_ED", "_VD", "exp_avg"))}
    assert kinds == {stored}
    assert main(["generate", f"checkpoint={run}", "prompt=abc", "max_new_tokens=2"]) == 0


def test_bits_per_byte_count_the_bytes_of_the_text(corpus, tmp_path):
    """Also for a tokenizer whose tokens do not add up to the text: here each token is a word."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    words = sorted({word for file in (corpus / "text").iterdir() for word in file.read_text().split()})[:30]
    vocabulary = {token: number for number, token in enumerate(["<unk>", *words])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    given = ["data.tokenizer.kind=file", f"data.tokenizer.path={tmp_path}/tokenizer.json"]
    run = tmp_path / "run"
    command = tiny.command(corpus, run, *given, "train.steps=1", "train.eval_samples=null")
    cfg, notes = checked(command[1:])
    assert train(cfg, load_yaml, notes)
    held_out = prepare(cfg.data, cfg.train.seed).val
    (evaluation,) = tiny.evaluations(run)
    # every token but the stream's first and the first of each later document is a label
    labels = held_out.num_tokens - held_out.num_documents
    assert held_out.num_bytes > 1.3 * labels
    expected = evaluation["val/loss"] * labels / math.log(2) / held_out.num_bytes
    assert evaluation["val/bits_per_byte"] == pytest.approx(expected, rel=0.03)


def generated(capsys, *overrides: str) -> str:
    assert main(["generate", "max_new_tokens=7", *overrides]) == 0
    return capsys.readouterr().out


def test_generate_from_a_run(trained, tmp_path, capsys):
    before = tiny.files(trained)
    text = generated(capsys, f"checkpoint={trained}", "prompt=abc")
    assert text.startswith("abc")
    assert len(text) > 3
    assert generated(capsys, f"checkpoint={trained}", "prompt=abc") == text
    newest = tiny.checkpoint(trained, tiny.STEPS)
    assert generated(capsys, f"checkpoint={newest}", "prompt=abc") == text
    assert generated(capsys, f"checkpoint={trained}", "prompt=abc", "seed=1") != text
    (tmp_path / "prompt.txt").write_text("abc")
    assert generated(capsys, f"checkpoint={trained}", f"prompt_file={tmp_path}/prompt.txt") == text
    greedy = [f"checkpoint={trained}", "prompt=abc", "temperature=0"]
    assert generated(capsys, *greedy) == generated(capsys, *greedy, "precision=fp64")
    assert generated(capsys, *greedy, "precision=bf16").startswith("abc")
    assert generated(capsys, f"checkpoint={trained}", "prompt=")  # starts a document
    assert tiny.files(trained) == before


def test_status_tells_what_became_of_a_run(trained, capsys):
    assert main(["status", str(trained)]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("12/12", "step_00000012", "finished"))
