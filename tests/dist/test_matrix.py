"""The matrix has every router, layer and wiring there is; all of it is marked slow (see ``matrix.py``).

Its result is recorded in docs/expert_parallelism.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from layer_cases import COMMAND, LAYERS
from parity_cases import CASES, LAYOUTS, SUBJECTS, judge

from moetrain.config.hydra.compose import compose_train
from moetrain.config.validate import validate
from moetrain.models.feed_forward import FEED_FORWARDS
from moetrain.models.wiring_options import Wiring
from moetrain.moe import ROUTERS

WIDEST = "hsdp 2 x ep 4"  # four ranks for the experts
SPREAD = ("layer avg_k", "layer s2moe")  # layers that ranks of ep share


def test_nothing_that_is_registered_is_left_out():
    own = {name for name in FEED_FORWARDS if FEED_FORWARDS[name].__module__.startswith("moetrain.")}
    assert own - {"dense", "moe"} == set(LAYERS) == set(COMMAND)
    assert {f"router {n}" for n, spec in ROUTERS.items() if spec.cls.__module__.startswith("moetrain.")} <= {
        *SUBJECTS
    }
    wirings = {compose_train(given).model.wiring for name, given in SUBJECTS.items() if "wiring" in name}
    assert wirings | {Wiring.residual} == {*Wiring}  # pr_moe's is residual, by its experiment
    assert len(LAYOUTS) == 16
    assert len(CASES) == 16 * len(SUBJECTS)


@pytest.mark.real
@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        ("norm_misses_the_experts", "differs", "padded, accumulated: 1 of 2 norms differ"),
        ("splits_swapped", "failed", ""),  # and ends the ranks that prove all of a subject's layouts
    ],
    ids=["differs", "fails"],
)
def test_a_fault_is_told_of_the_layout_that_has_it(fault, kind, text, monkeypatch):
    """Layouts are proved by the same ranks, one after the other."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setitem(SUBJECTS, "planted", ["plugins=[faults]", "model.num_layers=1"])
    judged = judge("planted", ["ep 2", "dp 2"])
    assert judged["dp 2"].kind == "equal", judged
    assert judged["ep 2"].kind == kind, judged
    assert judged["ep 2"].text.startswith(text)


@pytest.mark.slow
def test_every_subject_can_be_laid_out():
    """What is refused is refused because its layer has no use for expert parallelism."""
    world, parallel = LAYOUTS[WIDEST]
    for subject, given in SUBJECTS.items():
        cfg = compose_train([*given, *parallel])
        if subject.startswith("layer ") and subject not in SPREAD:
            with pytest.raises(Exception, match=r"so it has no use for parallel\.ep=4"):
                validate(cfg, world)
        else:
            validate(cfg, world)


@pytest.mark.slow
@pytest.mark.parametrize("world", sorted({world for world, _ in LAYOUTS.values()}))
@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_subject_on_every_layout(subject, world):
    judged = judge(subject, [layout for layout, (ranks, _) in LAYOUTS.items() if ranks == world])
    assert {layout: verdict for layout, verdict in judged.items() if not verdict.good} == {}
