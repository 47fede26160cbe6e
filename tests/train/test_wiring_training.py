"""Wirings of blocks and shapes of experts, from their yaml: train, resume, recompute, generate, refuse."""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch
from wiring_cases import WIRINGS

from moetrain.cli import main
from moetrain.config.hydra.compose import compose_train
from moetrain.models.cache import KVCache
from moetrain.models.count import abstract_decoder

pytestmark = pytest.mark.usefixtures("training")
THREE = ["train.steps=3", "checkpoint.every=1", "checkpoint.keep_last=9", "train.eval_every=3"]
# One of each kind of block.
DIFFERENT = ("pr_moe", "hmoe", "adam_smoe", "scmoe")
OTHERS = [pytest.param(name, marks=[pytest.mark.real] * (name not in DIFFERENT)) for name in WIRINGS]
ELSEWHERE = {
    "pr_moe": "model.wiring=residual", "smallthinker": "model.router_input=pre_attention",
    "hmoe": r"model.expert_widths=[4,12,8,8]", "scmoe": "model.wiring=shortcut",
    "adam_smoe": "model.wiring=momentum", "drelu": "model.layer_widths=[12,8]",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_trains_resumes_and_recomputes_bit_for_bit_and_generates(name, corpus, tmp_path):
    run, copy, again = tmp_path / "run", tmp_path / "copy", tmp_path / "again"
    options = [*WIRINGS[name], *THREE]
    assert tiny.train(corpus, run, *options) == 0
    shutil.copytree(run, copy)
    for step in (2, 3):
        shutil.rmtree(tiny.checkpoint(copy, step))
    assert tiny.train(corpus, copy, *options) == 0
    assert tiny.steps(copy) == tiny.steps(run)
    tiny.assert_same_state(tiny.checkpoint(copy, 3), tiny.checkpoint(run, 3))
    assert tiny.train(corpus, again, *options, "train.recompute=true") == 0
    assert tiny.steps(again) == tiny.steps(run)
    tensors, others = (tiny.contents(tiny.checkpoint(folder, 3))[0] for folder in (run, again))
    assert not [key for key, tensor in tensors.items() if not tensor.equal(others[key])]
    assert main(["generate", f"checkpoint={run}", "prompt=abc", "max_new_tokens=3"]) == 0


@pytest.mark.parametrize("name", WIRINGS)
def test_token_by_token_equals_the_whole(name, corpus):
    cfg = compose_train([*tiny.OVERRIDES, f"data.path={corpus}", *WIRINGS[name]])
    model = abstract_decoder(cfg.model, cfg.router, cfg.experts, 11).to_empty(device="cpu").double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        for buffer in model.buffers():
            buffer.zero_()
        model.eval()
        ids, cache = torch.arange(7)[None], KVCache(cfg.model.num_layers, 7)
        whole = model(ids).hidden_BSD
        parts = [model(part, cache=cache).hidden_BSD for part in ids.split([3, 1, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_has_no_such_blocks_refuses_them(name, corpus, tmp_path, capsys):
    run = tmp_path / "run"
    assert tiny.train(corpus, run, *WIRINGS[name], "train.steps=1") == 0
    assert main(["export", f"checkpoint={run}", f"target={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert f"{ELSEWHERE[name]}: no family has such blocks" in said
    assert not (tmp_path / "out").exists()
    dense = tmp_path / "dense"
    assert tiny.train(corpus, dense, "model.num_experts=0", "balance=none", "train.steps=1") == 0
    shapes = [key for key in WIRINGS[name] if key.startswith("model.") and "num_layers" not in key]
    wired = [ELSEWHERE[name], *shapes]
    command = ["upcycle", f"source={dense}", f"target={tmp_path / 'up'}", "model.num_experts=4", *wired]
    assert main(command) == 2
    assert "upcycling makes plain blocks of equal layers only" in capsys.readouterr().err
    assert not (tmp_path / "up").exists()
