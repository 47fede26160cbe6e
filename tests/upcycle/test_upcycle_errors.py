"""What cannot be upcycled is refused in one line with both numbers; nothing is lost or made twice."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from upcycle_cases import SEED, State, build, config, dense_state, target

from moetrain.errors import UserError
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.topk import TopKOptions
from moetrain.upcycle import (
    METHODS,
    CopyOptions,
    DropOptions,
    GranularOptions,
    GrowOptions,
    JoinOptions,
    LayerCalibration,
    MethodOptions,
    RouterStart,
    SplitBy,
    SplitOptions,
    upcycle,
)

SLICED = {"d_ff": 39, "d_ff_expert": 13, "num_experts": 12}


def refused(options: MethodOptions, words: str, router: RouterConfig | None = None, **more: Any) -> None:
    """``words`` are separated by |: each must be in the one line."""
    state: State = more.pop("state", None) or dense_state(d_ff=more.get("d_ff", 29))
    extra = {name: more.pop(name) for name in ("calibration", "donors") if name in more}
    activation = more.pop("activation", "swiglu")
    with pytest.raises(UserError) as caught:
        upcycle(state, target(router, activation, **more), options, SEED, **extra)
    line = str(caught.value)
    assert "\n" not in line
    for word in words.split("|"):
        assert word in line


@pytest.mark.parametrize("options", [CopyOptions(), DropOptions(), JoinOptions()])
def test_whole_networks_need_experts_of_their_width(options: MethodOptions) -> None:
    refused(options, "d_ff=29|d_ff_expert=13", d_ff_expert=13)


def test_slices_must_come_out_even() -> None:
    refused(GranularOptions(), "d_ff_expert=7|d_ff=29", d_ff_expert=7)
    refused(GranularOptions(), "d_ff_expert=58|d_ff=29", d_ff_expert=58)
    refused(
        GranularOptions(), "num_experts=11|39 / 13 = 3", TopKOptions(top_k=3), **{**SLICED, "num_experts": 11}
    )
    refused(GranularOptions(), "top_k=4|39 / 13 = 3", TopKOptions(top_k=4), **SLICED)
    refused(GranularOptions(), "router=expert_choice|scale", RouterConfig(name="expert_choice"), **SLICED)
    refused(GranularOptions(scale=-1.0), "scale=-1.0", TopKOptions(top_k=3), **SLICED)


def test_parts_must_add_up() -> None:
    sizes = {"d_ff": 35, "d_ff_expert": 5, "num_experts": 6}
    refused(SplitOptions(), "6 * 5 + 0 = 30|d_ff=35", **sizes)
    refused(SplitOptions(), "6 * 5 + 10 = 40|d_ff=35", num_shared_experts=2, **sizes)
    sizes["num_experts"] = 7
    refused(SplitOptions(), "router=expert_choice|scale", RouterConfig(name="expert_choice"), **sizes)
    refused(SplitOptions(scale=0.0), "scale=0.0", **sizes)


def test_calibration_that_is_missing_or_of_another_layer() -> None:
    sizes = {"d_ff": 35, "d_ff_expert": 5, "num_experts": 7}
    shared = {**sizes, "num_experts": 5, "num_shared_experts": 2}
    refused(SplitOptions(by=SplitBy.clusters), "by=clusters|hidden_TF|layer 0", **sizes)
    refused(SplitOptions(), "shared expert|hidden_TF", **shared)
    short = {0: LayerCalibration(hidden_TF=torch.zeros(3, 34))}
    refused(SplitOptions(by=SplitBy.clusters), "34|35", calibration=short, **sizes)
    empty = {0: LayerCalibration(hidden_TF=torch.zeros(0, 35))}
    refused(SplitOptions(by=SplitBy.clusters), "hidden_TF", calibration=empty, **sizes)
    centroids = CopyOptions(router_start=RouterStart.centroids)
    refused(centroids, "router_start=centroids|inputs_TD")
    few = {0: LayerCalibration(inputs_TD=torch.zeros(3, 23))}
    refused(centroids, "8 clusters|3", calibration=few)


def test_routers_that_cannot_start() -> None:
    refused(CopyOptions(router_start=RouterStart.zeros), "top_k=8|2")
    refused(CopyOptions(router_std=0.0), "router_std=0.0")
    refused(CopyOptions(), "top_k=9|num_experts=8", TopKOptions(top_k=9))
    refused(CopyOptions(), "unknown router|nothing", RouterConfig(name="nothing"))


def test_options_out_of_range() -> None:
    refused(CopyOptions(noise_std=-1.0), "noise_std=-1.0")
    refused(CopyOptions(noise_fraction=1.5), "noise_fraction=1.5")
    refused(DropOptions(drop_ratio=1.5), "drop_ratio=1.5")
    refused(MethodOptions("nothing"), "method=nothing|adapters, copy")
    refused(replace(CopyOptions(), name="drop"), "DropOptions|CopyOptions")


def test_donors() -> None:
    refused(CopyOptions(), "method=copy|2", donors=[dense_state()])
    refused(JoinOptions(), "num_experts=8|3", donors=[dense_state(), dense_state()])
    refused(JoinOptions(), "[29, 23]|[13, 23]|donor 1", donors=[dense_state(d_ff=13)])
    refused(JoinOptions(), "donor 1|blocks.2", donors=[dense_state(num_layers=3)])
    other = {**dense_state(), "embed_VD": torch.zeros(7, 23)}
    refused(JoinOptions(), "[41, 23]|[7, 23]|donor 1", donors=[other])


def moe_state(**changes: Any) -> State:
    return build(config(**{"num_experts": 4, "d_ff_expert": 13, **changes}), TopKOptions()).state_dict()


def test_layers_of_the_other_kind() -> None:
    refused(CopyOptions(), "layer 0|MoE|method=copy", state=moe_state(d_ff_expert=29))
    refused(CopyOptions(), "layer 1|MoE|method=copy", state=moe_state(first_dense=1))
    refused(GrowOptions(), "layer 0|dense|method=grow")
    refused(GrowOptions(), "layer 0|dense", state=moe_state(first_dense=1), d_ff_expert=13)
    refused(GrowOptions(), "num_experts=7|4", state=moe_state(), d_ff_expert=13, num_experts=7)
    refused(GrowOptions(), "d_ff=13|d_ff_expert=29", state=moe_state())
    refused(GrowOptions(), "blocks.0|no place", state=moe_state(), d_ff_expert=13, first_dense=1)


def test_models_of_another_shape() -> None:
    refused(CopyOptions(), "2 layers|num_layers=3", num_layers=3)
    refused(CopyOptions(), "num_experts=0", num_experts=0)
    refused(CopyOptions(), "w_gate_FD is in|gelu is plain|experts.activation", activation="gelu")
    refused(CopyOptions(), "[20, 23]|[20, 24]", d_model=24)
    refused(CopyOptions(), "num_shared_experts=0, not 1", num_shared_experts=1)
    refused(CopyOptions(), "head_VD|nothing", tie_embeddings=False)
    refused(CopyOptions(), "head_VD|no place", state=dense_state(tie_embeddings=False))
    refused(CopyOptions(), "zero_experts", RouterConfig(name="moepp"))
    uneven = dense_state()
    uneven |= {name: t for name, t in dense_state(d_ff=31).items() if "blocks.1.feed_forward.w" in name}
    refused(CopyOptions(), "layer 1|31|29", state=uneven)
    refused(CopyOptions(), "embed_VD", state={"nothing": torch.zeros(1)})


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_no_tensor_is_lost_without_a_word(data: st.DataObject) -> None:
    """Any one tensor taken away or added is named."""
    state = dense_state(num_layers=3)
    goal = target(num_layers=3, moe_every=2)
    name = data.draw(st.sampled_from(sorted(state)))
    without = {key: t for key, t in state.items() if key != name}
    with pytest.raises(UserError, match=re.escape(name)):
        upcycle(without, goal, CopyOptions(), SEED)
    extra = data.draw(
        st.sampled_from(["new", "blocks.1.feed_forward.router.bias_E", "blocks.2.new.weight_D"])
    )
    with pytest.raises(UserError, match=re.escape(extra)):
        upcycle({**state, extra: torch.zeros(8)}, goal, CopyOptions(), SEED)


def test_every_method_names_its_paper() -> None:
    own = {"adapters", "copy", "diversify", "drop", "extend", "granular", "grow", "join", "low_rank", "split"}
    assert set(METHODS) == own
    assert all("arXiv:" in spec.paper and spec.options.__name__ for spec in METHODS.values())
    assert all(spec.options(name=name).name == name for name, spec in METHODS.items())
