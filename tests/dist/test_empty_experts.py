"""Experts that saw no token have gradients of zero, not none, on whichever rank they live."""

from __future__ import annotations

from dataclasses import replace

from moetrain.config.hydra.compose import compose_train
from moetrain.parallel.ranks import run_ranks
from moetrain.train.task import batch_arguments
from moetrain.verify.batches import alike, cut, mixed
from moetrain.verify.measure import build
from moetrain.verify.twin import SEQ, VOCAB, Twin, twin_of


def _local_gradients(rank: int, world: int, twin: Twin) -> dict[str, float | None]:
    """The largest of each parameter's gradient that this rank holds; None where there is none."""
    made = build(twin.cfg)
    whole = alike(mixed(twin.sequences, SEQ, VOCAB, seed=0))
    (batch,) = cut(whole, twin.sequences // world, rank, world)
    output = made.task(**batch_arguments(batch, seed=0, step=0))
    output.loss_sum.backward()
    gradients = {name: p.grad for name, p in made.task.named_parameters() if ".experts." in name}
    return {name: None if g is None else float(g.to_local().abs().sum()) for name, g in gradients.items()}


def test_experts_without_a_token_have_gradients_of_zero():
    """All tokens go to one expert, so one of two ranks has none; each rank holds four of eight experts."""
    cfg = compose_train(["parallel.ep=2", "router=topk", "router.top_k=1", "balance=none"])
    twin = twin_of(cfg, 2, 2)
    twin = replace(twin, cfg=replace(twin.cfg, train=replace(twin.cfg.train, recompute=True)))
    one, other = run_ranks(_local_gradients, 2, twin)
    assert one.keys() == other.keys()
    assert len(one) == 4
    for name, sums in ((name, (one[name], other[name])) for name in one):
        assert None not in sums, name
        assert min(sums) == 0 < max(sums), name
