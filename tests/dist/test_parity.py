"""Every kind of router on every kind of layout equals one process; see ``moetrain/verify``.

The suite runs a few pairs, so that each router and each kind of layout occurs; test_matrix.py has all pairs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from parity_cases import LAYOUTS, MODEL, VARIANTS

from moetrain.config.hydra.compose import compose_train
from moetrain.train.options import Precision
from moetrain.verify.command import prove
from moetrain.verify.compare import Check
from moetrain.verify.twin import twin_of

PAIRS = [
    ("topk", "ep 2 x efsdp 2"),
    ("expert_choice, all", "ep 2"),
    ("moepp", "overlap 2, ep 2"),
    ("quantile", "ep 2"),
    pytest.param("sigmoid", "hsdp 2 x ep 2", marks=pytest.mark.real),
    pytest.param("quantile", "hsdp 2 x ep 2", marks=pytest.mark.real),
    pytest.param("phi", "hsdp 2 x ep 2", marks=pytest.mark.slow),
    pytest.param("relu", "hierarchical, ep 4", marks=pytest.mark.real),
]


def checks(router: str, layout: str, precision: Precision, tolerance: float, *more: str) -> list[Check]:
    world, parallel = LAYOUTS[layout]
    cfg = compose_train([*MODEL, *VARIANTS[router], *more, *parallel])
    twin = twin_of(cfg, world, 8)
    twin = replace(twin, cfg=replace(twin.cfg, train=replace(twin.cfg.train, precision=precision)))
    return prove(twin, tolerance)


def assert_equal(found: list[Check], least: int = 200) -> None:
    assert [check.problem for check in found if not check.holds] == []
    assert sum(check.number for check in found) > least


@pytest.mark.parametrize(("router", "layout"), PAIRS)
def test_a_layout_equals_one_process(router, layout):
    assert_equal(checks(router, layout, Precision.fp64, 1e-9))


@pytest.mark.real
@pytest.mark.parametrize(("router", "rule"), [("rounds", "nearest"), ("sigmoid", "up")])
def test_rounding_is_the_same_on_a_layout(router, rule):
    found = checks(router, "ep 2 x efsdp 2", Precision.fp64, 1e-9, f"router.rounding={rule}")
    assert_equal(found)


OTHER_DISPATCHERS = ["hierarchical, ep 4", "all_gather, ep 2 x efsdp 2"]


@pytest.mark.real
@pytest.mark.parametrize("layout", ["ep 2", "hsdp 2 x ep 2"])
def test_a_local_repair_is_the_same_on_a_layout(layout):
    more = ("router.repair=local_fill_in", "router.capacity_factor=0.7", "router.drop_order=probability")
    assert_equal(checks("topk", layout, Precision.fp64, 1e-9, *more))


@pytest.mark.real
@pytest.mark.parametrize("layout", [
    "hsdp 2 x ep 2", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_DISPATCHERS)
])  # fmt: skip
def test_dropout_in_experts_is_the_same_on_a_layout(layout):
    """Masks are a token's and an expert's own, wherever the row is computed; products beside matrices too."""
    more = ("experts.dropout=0.4", "experts.input_dropout=0.1", "model.lora.rank=3")
    assert_equal(checks("topk", layout, Precision.fp64, 1e-9, *more))


PRODUCTS = (
    "model.lora.rank=3",
    "model.lora.targets=['*.attention.w_*','*.shared.w_*','*.experts.*=2','*.router.*=1']",
    "optim.frozen=['*','!*.lora_*']",
)
DROPPED = (*PRODUCTS, "model.lora.targets=['*.attention.w_*','*.experts.*=2']", "model.lora.dropout=0.3")


@pytest.mark.real
@pytest.mark.parametrize(
    ("more", "layout"),
    [
        (PRODUCTS, "ep 2"),
        (PRODUCTS, "dp 2"),
        (DROPPED, "ep 2 x efsdp 2"),
        (["experiment=mixlora"], "hsdp 2 x ep 2"),
        pytest.param(PRODUCTS, "hsdp 2 x ep 2", marks=pytest.mark.slow),
        pytest.param(PRODUCTS, "hierarchical, ep 4", marks=pytest.mark.slow),
        pytest.param(PRODUCTS, "overlap 2, ep 2", marks=pytest.mark.slow),
        pytest.param(DROPPED, "all_gather, ep 2 x efsdp 2", marks=pytest.mark.slow),
        pytest.param(["experiment=mixlora"], "ep 2", marks=pytest.mark.slow),
        pytest.param(["experiment=mixlora"], "hierarchical, ep 4", marks=pytest.mark.slow),
        pytest.param(["experiment=mixlora"], "overlap 2, ep 2", marks=pytest.mark.slow),
        pytest.param(["experiment=mixlora"], "all_gather, ep 2 x efsdp 2", marks=pytest.mark.slow),
    ],
)
def test_low_rank_products_are_the_same_on_a_layout(more, layout):
    """Those of experts, of attention and of the router, beside matrices that stay."""
    assert_equal(checks("topk", layout, Precision.fp64, 1e-9, *more), 100)


@pytest.mark.real
@pytest.mark.parametrize("layout", [pytest.param("ep 2", marks=pytest.mark.slow), "hsdp 2 x ep 2"])
def test_losses_of_choices_and_domains_are_the_same_on_a_layout(layout):
    prior = "{name: dirichlet, scope: sequence, options: {by_domain: [[1, 2, 1, 2, 1, 2, 1, 2]]}}"
    names = ("{name: penalty}", "{name: choice_balance}", "{name: choice_share}", prior)
    more = ("router=dynmoe_deepspeed", f"balance.losses=[{', '.join(names)}]")
    world, parallel = LAYOUTS[layout]
    twin = twin_of(compose_train([*more, *parallel]), world, 8)
    twin = replace(twin, cfg=replace(twin.cfg, train=replace(twin.cfg.train, precision=Precision.fp64)))
    assert_equal(prove(twin, 1e-9), 100)


COMPETING = ["router.rate=1", "router.warmup_steps=0"]
BY_OUTPUTS = {
    "competesmoe": ["router=competesmoe", *COMPETING, "router.most_layers=null"],
    "competesmoe_v1": ["router=competesmoe_v1", *COMPETING],
    "thor": ["router=thor", "train.task=thor"],
}


@pytest.mark.parametrize("layout", [
    pytest.param("ep 2", marks=pytest.mark.slow), pytest.param("hsdp 2 x ep 2", marks=pytest.mark.real),
    *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_DISPATCHERS),
])  # fmt: skip
@pytest.mark.parametrize("router", BY_OUTPUTS)
def test_choices_from_outputs_are_the_same_on_a_layout(router, layout):
    """All experts answer, chosen ones send their directions too; two passes through every sharded block."""
    world, parallel = LAYOUTS[layout]
    twin = twin_of(compose_train([*BY_OUTPUTS[router], *parallel]), world, 8)
    twin = replace(twin, cfg=replace(twin.cfg, train=replace(twin.cfg.train, precision=Precision.fp64)))
    assert_equal(prove(twin, 1e-9), 100)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp 2", "ep 4", "ep 2 x efsdp 2", "hsdp 2 x ep 2", "ep 8"])
@pytest.mark.parametrize("router", VARIANTS)
def test_in_single_precision(router, layout):
    assert_equal(checks(router, layout, Precision.fp32, 1e-5))
