"""Routing replay by the commands: train and eval record and force, generate records."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from moetrain.cli import main
from moetrain.config.stored import trained_config
from moetrain.convert.open_model import open_model
from moetrain.moe import RouterContext
from moetrain.train.routes import RouteReader

pytestmark = pytest.mark.usefixtures("training")

ROUTED = ["router=sigmoid", "router.jitter=0.1", "balance=quantile", "train.steps=3", "train.eval_every=0"]


def weights(run, step=3):
    return tiny.contents(tiny.checkpoint(run, step))[0]


@pytest.fixture(scope="module")
def recorded(corpus, tmp_path_factory):
    """A run, and the record of its steps."""
    folder = tmp_path_factory.mktemp("recorded")
    with tiny.alone():
        assert tiny.train(corpus, folder / "run", *ROUTED, f"replay.record={folder}/routes") == 0
    return folder


def test_recording_changes_nothing_and_ones_own_record_no_bit(corpus, recorded, tmp_path):
    for name, more in (("plain", []), ("forced", [f"replay.force={recorded}/routes"])):
        assert tiny.train(corpus, tmp_path / name, *ROUTED, *more) == 0
        assert tiny.steps(tmp_path / name) == tiny.steps(recorded / "run")
        ours, theirs = weights(tmp_path / name), weights(recorded / "run")
        assert not [key for key, tensor in ours.items() if not tensor.equal(theirs[key])]
    files = tiny.files(recorded / "routes")
    assert files == ["routes.json", *(f"step_{n:08d}.rank_00000.safetensors" for n in (1, 2, 3))]


def test_a_record_decides_whatever_the_router_would_choose(corpus, recorded, tmp_path):
    """Other micro-batches, recomputed, by a router that starts otherwise: the recorded loads."""
    options = [*ROUTED, "train.micro_batch_size=1", "train.recompute=true", "model.init_std=0.05"]
    losses = ["balance.losses=[{name: switch, coef: 0.01}]"]  # which counts ahead
    run = tmp_path / "run"
    assert tiny.train(corpus, run, *options, *losses, f"replay.force={recorded}/routes") == 0
    key = "moe/1/max_load"
    assert [row[key] for row in tiny.steps(run)] == [row[key] for row in tiny.steps(recorded / "run")]
    assert tiny.steps(run)[0]["train/loss"] != tiny.steps(recorded / "run")[0]["train/loss"]


def test_another_record_gives_another_run(corpus, recorded, tmp_path):
    """Every expert's number is one higher: the router's gradient is of the weights of other experts."""
    routes = tmp_path / "routes"
    routes.mkdir()
    (routes / "routes.json").write_bytes((recorded / "routes" / "routes.json").read_bytes())
    for path in (recorded / "routes").glob("*.safetensors"):
        rows = load_file(path)
        save_file({k: (t + 1) % 5 if "experts" in k else t for k, t in rows.items()}, routes / path.name)
    assert tiny.train(corpus, tmp_path / "run", *ROUTED, f"replay.force={routes}") == 0
    first, other = weights(recorded / "run"), weights(tmp_path / "run")
    name = "model.blocks.1.feed_forward.router.weight_ED"
    assert not first[name].equal(other[name])


def test_what_does_not_fit_is_one_line(corpus, recorded, tmp_path, capsys):
    routes, run = recorded / "routes", tmp_path / "run"
    for options, line in (
        (["router=relu"], "router=relu cannot be told which experts to take"),
        (["router=topk", "router.capacity_factor=1.0"], "a capacity or rounding takes some away"),
        (["router=sigmoid", "model.num_experts=7"], "layer 0 was 2 of 5 experts a token, and is 2 of 7"),
        (["router=sigmoid", "router.top_k=1"], "layer 0 was 2 of 5 experts a token, and is 1 of 5"),
        (["router=sigmoid", "train.steps=4"], "was not recorded (of 12 samples)"),
        (["router=sigmoid", "train.seed=1"], "a record fits the tokens that it was made of"),
        (["router=sigmoid", f"replay.record={routes}"], "replay.record and replay.force are both"),
    ):
        given = ["train.steps=3", "train.eval_every=0", "balance=none", *options, f"replay.force={routes}"]
        assert tiny.train(corpus, run, *given) == 2, line
        assert line in capsys.readouterr().err
    assert main(["verify", "parallel.ep=2", f"replay.force={routes}"]) == 2
    assert "a proof has tokens of its own" in capsys.readouterr().err
    assert tiny.train(corpus, run, "compare.arms={a: []}", f"replay.record={tmp_path}/r") == 2
    assert "is one run's, and compare.arms are several runs" in capsys.readouterr().err
    assert tiny.train(corpus, run, f"replay.force={tmp_path}/none") == 2
    assert "holds no record of routes" in capsys.readouterr().err


def test_evaluation_records_and_forces(corpus, recorded, tmp_path, capsys):
    given = ["eval", f"checkpoint={recorded}/run", f"data.path={corpus}/text/00.txt"]
    results = []
    for more in ([], [f"replay.record={tmp_path}/r"], [f"replay.force={tmp_path}/r", "batch_size=3"]):
        assert main([*given, f"json={tmp_path}/out.json", *more]) == 0
        results.append((tmp_path / "out.json").read_text())
    assert results[0] == results[1]
    assert (tmp_path / "r" / "batch_00000000.safetensors").exists()
    assert main([*given[:2], f"data.path={corpus}/text/01.txt", f"replay.force={tmp_path}/r"]) == 2
    assert "a record fits the tokens" in capsys.readouterr().err


def test_a_generated_text_is_replayed_in_a_pass_of_training(recorded, tmp_path, capsys):
    """Recorded token by token with a cache, forced in one pass with a gradient: the same experts."""
    out = tmp_path / "rollout"
    assert (
        main(["generate", f"checkpoint={recorded}/run", "prompt=abc", "max_new_tokens=6", f"record={out}"])
        == 0
    )
    rows = load_file(out / "text.safetensors")
    tokens_BS = rows["tokens"].long()
    assert tokens_BS.shape == (1, 3 + 5)  # the last token that was written was not read
    model = open_model(recorded / "run", trained_config).build(False, "cpu").train()
    with torch.no_grad():
        for router in model.routers().values():
            router.weight_ED.neg_()  # it would choose others by now
    forced = RouteReader(out, model.routers()).forced(torch.zeros(1, dtype=torch.int64), tokens_BS)
    ctx = RouterContext.default(1, tokens_BS.shape[1])
    records = model(tokens_BS, replace(ctx, forced=forced)).records
    free = model(tokens_BS, ctx).records
    for place, record in records.items():
        a, taken = record.assignment, torch.zeros_like(forced[place])
        taken[a.token_ids_N, a.choice_N] = a.expert_ids_N()
        assert torch.equal(taken.int(), rows[f"experts.{place}"][0])
        assert not torch.equal(record.demand_BE, free[place].demand_BE)
    sum(r.assignment.weights_N.sum() for r in records.values()).backward()
    capsys.readouterr()
