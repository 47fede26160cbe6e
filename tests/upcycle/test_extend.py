"""New experts beside old ones: the old stay to the bit in what is made and in training, the new are new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from upcycle_cases import SEED, build, config, loaded, target

from moetrain.cli import main
from moetrain.errors import UserError
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.module_former import ModuleFormerOptions
from moetrain.moe.routers.topk import TopKOptions
from moetrain.upcycle import ExtendOptions, upcycle

SIZES = {"num_experts": 4, "d_ff_expert": 13}
FF = "blocks.1.feed_forward."
ROUTERS = [
    (TopKOptions(), ("weight_ED",)),
    (ModuleFormerOptions(hidden=11), ("weight_EH", "hidden_HD", "hidden_bias_H")),
]


def source(router: RouterConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = build(config(**SIZES), router)
    for (layer,) in model.moe_layers().values():
        layer.router.bias_E.copy_(0.1 * torch.randn_like(layer.router.bias_E))
    return model.state_dict()


@pytest.mark.parametrize(("router", "names"), ROUTERS)
def test_old_experts_are_the_sources_and_new_ones_are_drawn(
    router: RouterConfig, names: tuple[str, ...]
) -> None:
    state, goal = source(router), target(router, **{**SIZES, "num_experts": 9})
    result = upcycle(state, goal, ExtendOptions(expert_std=0.25), SEED)
    loaded(result, goal)
    assert not result.preserves
    assert "tokens may take 5 new experts" in result.reason
    assert "experts.frozen=4" in result.notes[0]
    for name in ("experts.w_gate_up_EDCF", "experts.w_down_EFD"):
        new = result.state[FF + name]
        assert torch.equal(new[:4], state[FF + name])
        assert float(new[4:].std()) == pytest.approx(0.25, rel=0.05)
        assert len({float(expert.sum()) for expert in new}) == 9
    for name in names:
        old, new = state[f"{FF}router.{name}"], result.state[f"{FF}router.{name}"]
        assert torch.equal(new[: len(old)], old)
        assert len(new) == (9 if "_E" in name else len(old))
        assert len({float(row.sum()) for row in new}) == len(new)
    bias = result.state[FF + "router.bias_E"]
    assert torch.equal(bias[:4], state[FF + "router.bias_E"])
    assert not bias[4:].any()
    again = upcycle(state, goal, ExtendOptions(expert_std=0.25), SEED).state
    assert all(torch.equal(again[name], tensor) for name, tensor in result.state.items())


def test_moments_of_old_experts_go_along_and_new_ones_have_none() -> None:
    state = source(TopKOptions())
    for name in [name for name in state if "bias_E" not in name]:
        for key in ("exp_avg", "exp_avg_sq"):
            state[f"optim.{name}.{key}"] = state[name].abs() + 1
        state[f"optim.{name}.step"] = torch.tensor(11.0)
    goal = target(TopKOptions(), **{**SIZES, "num_experts": 6})
    result = upcycle(state, goal, ExtendOptions(carry_optimizer=True), SEED).state
    for name in ("experts.w_gate_up_EDCF", "experts.w_down_EFD", "router.weight_ED"):
        for key in ("exp_avg", "exp_avg_sq"):
            moment = result[f"optim.{FF}{name}.{key}"]
            assert torch.equal(moment[:4], state[f"optim.{FF}{name}.{key}"])
            assert not moment[4:].any()


def test_fewer_experts_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.num_experts=3 is less than the source's 4"):
        upcycle(source(TopKOptions()), target(**{**SIZES, "num_experts": 3}), ExtendOptions(), SEED)


@pytest.mark.real
@pytest.mark.usefixtures("training")
def test_growth_by_the_commands(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    """Trained, extended, and trained on with the old part held: its experts and rows are the same bits."""
    old, new, grown = tmp_path / "old", tmp_path / "new", tmp_path / "grown"
    given = ["router=module_former", "router.hidden=11", "train.steps=2", "train.eval_every=0"]
    assert tiny.train(corpus, old, *given) == 0
    data = ["data=local", f"data.path={corpus}/text", "data.seq_len=16"]
    made = ["upcycle", f"source={old}", f"target={new}", "method=extend", "model.num_experts=8", *data]
    assert main(made) == 0
    held = ["experts.frozen=5", "router.held=5", "optim.frozen=[embed_VD,blocks.*.attention.*]"]
    losses = "balance.losses=[{name: mi, coef: 0.01}, {name: penalty, coef: 0.1}]"
    start = [f"init_from={new}", *held, losses, "train.steps=3", "train.eval_every=0", "experts=gelu"]
    given = [o for o in tiny.OVERRIDES if not o.startswith(("model.", "data"))]
    assert main(["train", *given, *data, f"run.dir={grown}", *start]) == 0
    before = tiny.contents(tiny.checkpoint(old, 2))[0]
    after = tiny.contents(tiny.checkpoint(grown, 3))[0]
    for name, tensor in before.items():
        if name.startswith("model.blocks") and ("experts." in name or "router.w" in name):
            assert torch.equal(after[name][:5], tensor), name
            assert len(after[name]) == 8
    capsys.readouterr()
    assert main(["train", *given, *data, f"run.dir={tmp_path / 'no'}", *start, "init_optimizer=true"]) == 2
    assert "moments that are taken over would go on moving what is to stay" in capsys.readouterr().err
