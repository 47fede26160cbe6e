"""Plug-ins of one file each that change nothing in the package: trained, resumed, proved, and told.

A plug-in's registrations end with its test.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from moetrain.cli import main
from moetrain.config.hydra import store
from moetrain.config.hydra.compose import compose_train
from moetrain.config.validate import validate
from moetrain.errors import UserError
from moetrain.models.attention import ATTENTIONS
from moetrain.models.cache import KVCache
from moetrain.models.count import abstract_decoder, flops_breakdown
from moetrain.models.feed_forward import FEED_FORWARDS, register_feed_forward
from moetrain.models.options import ModelConfig
from moetrain.moe import MoELayer
from moetrain.moe.balance import CONTROLLERS, LOSSES
from moetrain.moe.options import ExpertsConfig, RouterConfig
from moetrain.moe.routers import ROUTERS
from moetrain.train.evaluate import routing_by
from moetrain.train.task import TASKS

FOLDER = Path(__file__).parent
OVERLOAD = "balance.losses=[{name: overload, coef: 0.5, options: {slack: 0.125}}, {name: switch}]"
REGISTRIES = (LOSSES, CONTROLLERS, ROUTERS, FEED_FORWARDS, ATTENTIONS, TASKS)
LATENT = ["plugins=[latent_attention]", "model.attention=narrow"]
DISTILLATION = ["plugins=[distillation]", "train.task=distillation"]
UNEVEN = ["plugins=[uneven]", "model.feed_forward=uneven", "model.num_layers=3", "model.num_experts=4"]
# plug-in -> (overrides, keys of a step's row that are its own)
PLUGINS = {
    "own_loss": (["plugins=[own_loss]", OVERLOAD], ["moe/0/aux/overload_global_batch"]),
    "own_controller": (
        ["plugins=[own_controller]", "balance.controllers.pressure.bound=1.125"],
        ["balance/pressure_0", "balance/pressure_1"],
    ),
    "own_router": (["plugins=[own_router]", "router=top_p", "router.floor=0.5"], ["moe/1/experts_per_token"]),
    "soft_merging": (
        ["plugins=[soft_merging]", "model.feed_forward=soft_merging"],
        ["moe/1/entropy", "moe/0/aux/switch_global_batch"],
    ),
    "uneven": (
        [*UNEVEN, "balance=running", "balance.controllers.bias.rate=0.01"],
        ["moe/0/max_load", "moe/1/max_load", "moe/1/aux/switch_running"],
    ),
    "distillation": (DISTILLATION, ["train/loss", "train/grad_norm"]),
    "latent_attention": (LATENT, ["train/loss", "train/grad_norm"]),
}
LAYOUT = ["parallel.ep=2", "model.num_experts=4"]


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plug-ins can be imported, and are unknown again afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    kept = [(registry, dict(registry)) for registry in REGISTRIES]
    yield
    for registry, before in kept:
        registry.clear()
        registry.update(before)
    for name in PLUGINS:
        sys.modules.pop(name, None)
    store._register.cache_clear()  # which knows a plug-in's router by name alone


@pytest.mark.usefixtures("training")
@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_trains_and_resumes_bit_for_bit(name: str, corpus: Path, tmp_path: Path) -> None:
    overrides, keys = PLUGINS[name]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert tiny.train(corpus, whole, *overrides, "train.steps=4", "checkpoint.every=2") == 0
    for steps in (2, 4):
        assert tiny.train(corpus, parts, *overrides, f"train.steps={steps}", "checkpoint.every=2") == 0
    tiny.assert_same_state(tiny.checkpoint(whole, 4), tiny.checkpoint(parts, 4))
    rows = tiny.steps(whole)
    assert rows == tiny.steps(parts)
    for key in keys:
        values = [row[key] for row in rows]
        assert all(value > 0 for value in values), key
        assert len(set(values)) > 1, key  # it follows the run


@pytest.mark.usefixtures("training")
def test_layers_that_differ_are_told_apart(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, _ = PLUGINS["uneven"]
    assert tiny.train(corpus, tmp_path / "run", *overrides, "train.steps=2", "checkpoint.every=2") == 0
    loads = [json.loads(line) for line in (tmp_path / "run" / "load.jsonl").read_text().splitlines()]
    assert [(row["layers"], [len(load) for load in row["load"]]) for row in loads] == [([0, 1], [4, 6])] * 2
    tensors, _ = tiny.contents(tiny.checkpoint(tmp_path / "run", 2))
    shares = {name: len(tensor) for name, tensor in tensors.items() if "running_load" in name}
    assert shares == {"controller.running_load.0": 4, "controller.running_load.1": 6}
    assert not any(key.startswith("moe/2/") for key in tiny.steps(tmp_path / "run")[0])
    command = ["plugins=[uneven]", f"checkpoint={tmp_path / 'run'}"]
    assert main(["generate", *command, "prompt=ab", "max_new_tokens=3"]) == 0
    assert main(["export", *command, f"target={tmp_path / 'out'}"]) == 2
    assert "model.feed_forward=uneven: no family has such layers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("training")
def test_an_attention_of_ones_own_writes_and_counts(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert tiny.train(corpus, run, *LATENT, "train.steps=2") == 0
    tensors, _ = tiny.contents(tiny.checkpoint(run, 2))
    name = "model.blocks.1.attention.w_latent_LD"
    assert tensors[name].shape == (5, 16)
    assert tensors[name.replace("model.", "optim.", 1) + ".exp_avg"].any()
    cfg = compose_train([*tiny.OVERRIDES, f"data.path={corpus}", *LATENT])
    flops = flops_breakdown(cfg.model, cfg.router, 7, 11)
    assert flops.projections == 2 * 2 * (16 * 16 + 5 * 16 + 2 * 16 * 5 + 16 * 16)
    assert flops.scores == 2 * 2 * 2 * 16 * 4  # 4 keys on average, 16 elements in all heads
    model = abstract_decoder(cfg.model, cfg.router, cfg.experts, 11).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        ids, cache = torch.arange(7)[None], KVCache(2, 7)
        whole = model(ids).hidden_BSD
        parts = [model(part, cache=cache).hidden_BSD for part in ids.split(3, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    command = ["plugins=[latent_attention]", f"checkpoint={run}"]
    assert main(["generate", *command, "prompt=ab", "max_new_tokens=3"]) == 0
    assert main(["export", *command, f"target={tmp_path / 'out'}"]) == 2
    assert "model.attention=narrow is a plug-in's: no family has such attention" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("training")
def test_a_task_of_ones_own_decides_the_loss(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It falls as the teacher is learnt; text is no likelier for that, and no checkpoint has the teacher."""
    run, steps = tmp_path / "run", ["train.steps=20", "optim.lr=0.03"]
    assert tiny.train(corpus, run, *DISTILLATION, *steps) == 0
    losses = [row["train/loss"] for row in tiny.steps(run)]
    assert losses[-1] < 0.7 * losses[0]
    assert tiny.evaluations(run)[-1]["val/loss"] > math.log(257)
    assert tiny.train(corpus, tmp_path / "text", *steps) == 0
    tensors = [set(tiny.contents(tiny.checkpoint(tmp_path / name, 20))[0]) for name in ("run", "text")]
    assert tensors[0] == tensors[1]
    assert tiny.train(corpus, run, *steps, "train.steps=21") == 2
    assert "train.task" in capsys.readouterr().err
    assert tiny.train(corpus, tmp_path / "none", "train.task=distilation") == 2
    said = capsys.readouterr().err
    assert "train.task=distilation is not known; known: distillation, next_token, thor (did" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["model.attention=narow"],
            "=narow is not known; known: gated_delta, grouped_query, latent, narrow (did you mean",
        ),
        (["model.attention=flex"], "a backend's name belongs in model.attention_backend"),
        (["model.head_dim=6"], "model.attention=narrow: layer 0: half of a head turns, and model.head_dim=6"),
    ],
)
def test_what_an_attention_refuses_is_one_line(
    overrides: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *LATENT, *overrides]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert line in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "names",
    [
        ("own_loss", "own_controller", "own_router"),
        pytest.param(("soft_merging",), marks=pytest.mark.real),
        ("uneven",),
        pytest.param(("latent_attention",), marks=pytest.mark.real),
        pytest.param(("distillation",), marks=pytest.mark.real),
    ],
)
def test_a_plugin_is_the_same_on_two_ranks(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [o for name in names for o in PLUGINS[name][0] if not o.startswith("plugins=")]
    small = ["model.num_layers=1"] if "uneven" not in names else []
    code = main(["verify", f"plugins=[{','.join(names)}]", *LAYOUT, *small, *overrides])
    said = " ".join(capfd.readouterr().out.split())
    assert code == 0, said
    assert "equal to one process; certificate" in said
    (certificate,) = (tmp_path / "runs" / "certificates").iterdir()
    proved = {check["scenario"] for check in json.loads(certificate.read_text())["checks"]}
    assert ("loss overload_global_batch alone" in proved) is ("own_loss" in names)


@pytest.mark.usefixtures("training")
def test_layers_may_have_other_routers(corpus: Path, tmp_path: Path) -> None:
    """One that moves by its own statistics, one with a second way of evaluating, one with neither."""
    routers = (("topk", 5), ("dynmoe", 7), ("expert_choice", 3))

    @register_feed_forward("mixed", on_meta=True)
    def build(cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> nn.Module:
        name, number = routers[layer]
        return MoELayer(cfg.d_model, cfg.d_ff_expert, number, name)

    mixed = ["model.feed_forward=mixed", "model.num_layers=3", "balance=aux_free"]
    cfg = compose_train([*tiny.OVERRIDES, f"data.path={corpus}", *mixed])
    model = abstract_decoder(cfg.model, cfg.router, cfg.experts, 11)
    with routing_by(model, "group"):
        assert [router.eval_mode for router in model.routers().values()] == ["", "", "group"]
    assert tiny.train(corpus, tmp_path, *mixed, "train.steps=2", "checkpoint.every=1") == 0
    states = [tiny.contents(tiny.checkpoint(tmp_path, step))[0] for step in (1, 2)]
    router = "model.blocks.{}.feed_forward.router"
    for name in (
        f"{router.format(1)}.steps",
        f"{router.format(2)}.threshold_E",
        f"{router.format(0)}.bias_E",
    ):
        assert not states[0][name].equal(states[1][name]), name
    assert all("val/loss_group" in row for row in tiny.evaluations(tmp_path))
    assert {key.split("/")[1] for key in tiny.steps(tmp_path)[0] if key.startswith("moe/")} == {"0", "1", "2"}


def test_a_loss_that_one_layers_router_cannot_have() -> None:
    @register_feed_forward("mixed", on_meta=True)
    def build(cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> nn.Module:
        return MoELayer(cfg.d_model, cfg.d_ff_expert, cfg.num_experts, "hash" if layer == 2 else "topk")

    mixed = ["model.feed_forward=mixed"]
    with pytest.raises(
        UserError, match=r"mixed: layer 2: router=hash returns no scores: take balance.losses.0.name=switch"
    ):
        validate(compose_train(mixed))
    validate(compose_train([*mixed, "balance=none"]))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["model.feed_forward=unevn"],
            "model.feed_forward=unevn is not known; known: avg_k, dense, meo, moe, moe_x, monet, peer, pkm, "
            "s2moe, smear, uneven (did",
        ),
        (
            ["model.num_layers=2"],
            "model.feed_forward=uneven: layer 0: there are 3 layers, and model.num_layers=2",
        ),
        (["parallel.ep=4"], "model.feed_forward=uneven: layer 1 has 6 experts, which parallel.ep=4 does not"),
        (["balance.losses=[{name: penalty}]"], "router=topk has no loss of its own"),
        (["router=hash", "balance=none", "balance.losses=[{name: z}]"], "router=hash returns no logits"),
        (["balance.losses=[{name: overload}]"], "balance.losses.0.name=overload is not known"),
    ],
)
def test_what_a_plugin_refuses_is_one_line(
    overrides: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["verify", *UNEVEN, *overrides]) == 2
    said = capsys.readouterr().err
    assert said.startswith("moetrain: error: ")
    assert said.count("\n") == 1
    assert line in said
    assert not list(tmp_path.iterdir())
