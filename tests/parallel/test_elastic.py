"""The rule by which a layout follows the number of ranks."""

from __future__ import annotations

import itertools

import pytest

from moetrain.config.checked import checked
from moetrain.config.hydra.compose import compose_train
from moetrain.errors import UserError
from moetrain.parallel.elastic import fitted
from moetrain.parallel.options import ExpertDispatch, ParallelConfig
from moetrain.parallel.rules import check_layout

HIERARCHICAL = {"dispatcher": ExpertDispatch.hierarchical, "ranks_per_node": 4}


@pytest.mark.parametrize(
    ("asked", "world", "experts", "expected"),
    [
        ({"ep": 4}, 4, 12, {"ep": 4}),
        ({"ep": 4}, 2, 12, {"ep": 2}),
        ({"ep": 4}, 8, 12, {"ep": 4}),  # no more than was asked for
        ({"ep": 4}, 6, 12, {"ep": 3}),
        ({"ep": 4}, 6, 10, {"ep": 2}),
        ({"ep": 4}, 5, 12, {"ep": 1}),
        ({"ep": 4}, 1, 12, {"ep": 1}),
        ({"ep": 4, "overlap": 3}, 2, 12, {"ep": 2, "overlap": 3}),
        ({"ep": 4, "overlap": 3}, 1, 12, {"ep": 1, "overlap": 1}),
        ({"dp_replicate": 4}, 6, 0, {"dp_replicate": 3}),
        ({"dp_replicate": 2, "ep": 4}, 4, 12, {"dp_replicate": 2, "ep": 2}),
        ({"dp_replicate": 2, "dp_shard": 4, "ep": 4}, 4, 12, {"dp_replicate": 1, "dp_shard": 4, "ep": 4}),
        ({"dp_replicate": 2, "dp_shard": 4}, 16, 12, {"dp_replicate": 4, "dp_shard": 4}),
        ({"dp_replicate": 2, "dp_shard": 4, "ep": 2}, 6, 12, {"dp_replicate": 2, "dp_shard": 3, "ep": 1}),
        ({"ep": 8, **HIERARCHICAL}, 6, 24, {"ep": 2}),  # 6 and 3 go neither into four ranks a node nor back
    ],
)
def test_sizes_that_do_not_fit_become_smaller(asked, world, experts, expected):
    found = fitted(ParallelConfig(**asked), world, experts)
    assert found == ParallelConfig(**(asked | expected))
    check_layout(found, world, experts)


def test_every_number_of_ranks_has_a_layout():
    sizes = itertools.product((1, 2, 3, 5), (None, 1, 2, 4, 7), (1, 2, 3, 4, 6), range(1, 13))
    for replicate, shard, ep, world in sizes:
        asked = ParallelConfig(dp_replicate=replicate, dp_shard=shard, ep=ep)
        found = fitted(asked, world, 12)
        check_layout(found, world, 12)
        assert found.ep <= ep
        assert fitted(found, world, 12) == found


BATCH = ["data.seq_len=8", "train.micro_batch_size=4", "parallel.elastic=true", "train.steps=700"]


@pytest.mark.parametrize(
    ("world", "sequences", "options", "micro"),
    [
        (4, 16, [], 4),
        (2, 16, [], 4),  # twice as many micro-batches
        (8, 16, [], 2),
        (3, 15, [], 1),  # five a rank
        (3, 18, [], 3),
        (1, 7, [], 1),
        (2, 12, ["router.group=2"], 2),
        (2, 16, ["router.group=2"], 4),
    ],
)
def test_a_rank_takes_its_share_in_equal_parts(world, sequences, options, micro):
    cfg, said = checked([*BATCH, *options, f"train.global_batch_tokens={8 * sequences}"], world)
    assert cfg.train.micro_batch_size == micro
    told = f"train.micro_batch_size={micro} on {world} rank(s), where 4 was asked for"
    assert any(told in line for line in said) is (micro != 4)


def test_what_changed_is_said():
    cfg, said = checked([*BATCH, "train.global_batch_tokens=96", "parallel.ep=4"], 2)
    assert (cfg.parallel.ep, cfg.parallel.elastic) == (2, True)
    assert said[0] == "parallel.elastic: parallel.ep=2 on 2 rank(s), where 4 was asked for"


def test_without_it_nothing_changes():
    overrides = ["data.seq_len=8", "train.global_batch_tokens=96", "parallel.ep=4"]
    with pytest.raises(UserError, match=r"parallel\.ep=4 borrows ranks of parallel\.dp_shard"):
        checked([*overrides, "train.micro_batch_size=2"], 2)
    whole = [*overrides, "parallel.elastic=true", "train.micro_batch_size=3"]
    assert checked(whole, 4)[0] == compose_train(whole)


def test_ranks_that_cannot_share_a_batch_are_refused():
    with pytest.raises(UserError) as error:
        checked([*BATCH, "train.global_batch_tokens=64"], 3)
    assert str(error.value).startswith(
        "parallel.elastic: train.global_batch_tokens=64 is 8 sequences of data.seq_len=8, which 3 ranks "
        "cannot share equally: start a number of ranks that divides them"
    )
