"""``experts.backend`` reaches every part of a layer whose experts are spread over ranks."""

from __future__ import annotations

import pytest

from moetrain.config.hydra.compose import compose_train
from moetrain.moe import MoELayer
from moetrain.parallel.ranks import run_ranks
from moetrain.verify.measure import build
from moetrain.verify.twin import Twin, twin_of


def _backends(rank: int, world: int, twin: Twin) -> set[tuple[str, ...]]:
    layers = [layer for layer in build(twin.cfg).task.modules() if isinstance(layer, MoELayer)]
    return {(layer.experts.backend, layer.router.backend, layer.dispatcher.backend) for layer in layers}


@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
def test_every_part_has_the_backend(dispatcher: str) -> None:
    cfg = compose_train(["parallel.ep=2", f"parallel.dispatcher={dispatcher}", "experts.backend=loop"])
    assert run_ranks(_backends, 2, twin_of(cfg, 2, 2)) == [{("loop",) * 3}] * 2
