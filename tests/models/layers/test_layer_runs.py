"""Layers without a dispatch as a user runs them: trained, resumed, written with, proved on ranks, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from layer_cases import COMMAND

from moetrain.cli import main


@pytest.mark.usefixtures("training")
@pytest.mark.parametrize("name", COMMAND)
def test_a_layer_trains_resumes_and_writes(
    name: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert tiny.train(corpus, whole, *COMMAND[name], "train.steps=3", "checkpoint.every=2") == 0
    for steps in (2, 3):
        assert tiny.train(corpus, parts, *COMMAND[name], f"train.steps={steps}", "checkpoint.every=2") == 0
    tiny.assert_same_state(tiny.checkpoint(whole, 3), tiny.checkpoint(parts, 3))
    assert tiny.steps(whole) == tiny.steps(parts)
    first, last = (tiny.contents(tiny.checkpoint(whole, step))[0] for step in (2, 3))
    for key in first:
        if key.startswith("model.") and ".feed_forward." in key and not key.endswith("bias_E"):
            assert not first[key].equal(last[key]), key  # every weight and every statistic moves
    assert main(["generate", f"checkpoint={whole}", "prompt=ab", "max_new_tokens=5"]) == 0
    assert main(["export", f"checkpoint={whole}", f"target={tmp_path / 'out'}"]) == 2
    assert f"model.feed_forward={name}: no family has such layers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(2, "parallel=fsdp", id="fsdp 2", marks=pytest.mark.slow),
        pytest.param(2, "parallel.dp_replicate=2", id="dp 2", marks=pytest.mark.slow),
        pytest.param(4, "parallel.dp_replicate=2", id="hsdp 2x2", marks=pytest.mark.real),
    ],
)
@pytest.mark.parametrize("name", COMMAND)
def test_a_layer_is_the_same_on_ranks(
    name: str,
    world: int,
    layout: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main(["verify", *COMMAND[name], f"verify.world={world}", layout])
    said = " ".join(capfd.readouterr().out.split())
    assert code == 0, said
    assert "equal to one process; certificate" in said
    (certificate,) = (tmp_path / "runs" / "certificates").iterdir()
    assert json.loads(certificate.read_text())["checks"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model=peer", "model.num_experts=17"], "layer 0: model.num_experts=17 must be a square"),
        (["model=peer", "experts=swiglu"], "layer 0: experts.activation=swiglu is gated"),
        (["model=peer", "parallel.ep=2"], "layer 0 dispatches no tokens, so it has no use for parallel.ep=2"),
        (["model=peer", "balance=switch"], "layer 0: router=peer returns no scores: take balance.losses.0"),
        (
            ["model=peer", "balance=aux_free", "balance.losses=[]"],
            "peer: router=peer never reads the selection bias",
        ),
        (["model=pkm", "model.num_shared_experts=1"], "model.num_shared_experts=1 is of dispatched experts"),
        (
            ["model=moe_x", "parallel.ep=2"],
            "layer 0 routes by the weights of all experts, so it has no use for",
        ),
        (["model=moe_x", "router=relu"], "layer 0: router=relu: it has a router of its own"),
        (["model=avg_k", "router=sigmoid"], "layer 0: router=sigmoid: it has a router of its own"),
        (["model=avg_k", "experts=adapters"], "layer 0: experts.kind=adapters has no keys"),
        (["model.avg_k.weight=score"], "model.avg_k.weight=score is not used by model.feed_forward=moe"),
        (["model=moe_x", "experts=silu"], "experts.activation=silu leaves no unit at 0"),
        (["model=monet", "experts.kind=adapters"], "experts.kind=adapters is of dispatched experts"),
        (["model=meo", "balance.losses=[{name: z}]"], "layer 0: router=meo returns no logits"),
        (
            ["model=smear", "model.merging.route_by=sequence"],
            "route_by=sequence lets every token see later ones",
        ),
        (
            ["optim.tables=row_adam"],
            "optim.tables=row_adam is of tables whose rows are looked up, and model.",
        ),
        (["model.product_keys.heads=3"], "model.product_keys.heads=3 is not used by model.feed_forward=moe"),
    ],
)
def test_what_a_layer_refuses_is_one_line(
    overrides: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["verify", *overrides]) == 2
    said = capsys.readouterr().err
    assert said.startswith("moetrain: error: ")
    assert said.count("\n") == 1
    assert line in said
    assert not list(tmp_path.iterdir())
