"""The hash router's table that is balanced by token frequency.

Shapes: T tokens, E experts, V token ids.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config.hydra.compose import compose_train
from moetrain.config.validate import validate
from moetrain.errors import UserError
from moetrain.moe import Router, RouterContext, build_router
from moetrain.moe.routers.hash_tables import balanced_table, dispersed_table

counted = st.dictionaries(st.integers(0, 60), st.integers(0, 50), max_size=40)


def written(folder: Path, counts: Any) -> str:
    path = folder / "counts.json"
    path.write_text(counts if isinstance(counts, str) else json.dumps(counts))
    return str(path)


def hash_router(path: str | None, num_experts: int = 5) -> Router:
    return build_router("hash", d_model=3, num_experts=num_experts, top_k=1, frequencies=path)


def experts_of(router: Router, ids: list[int]) -> list[int]:
    """The expert of each id, in the order of ``ids``."""
    ctx = RouterContext(1, len(ids), torch.arange(1), torch.tensor(ids, dtype=torch.int64))
    routing = router(torch.zeros(len(ids), 3), ctx)
    routing.check()
    return routing.assignment.expert_ids_N()[routing.assignment.token_ids_N.argsort()].tolist()


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(counted, st.sampled_from([1, 2, 3, 7, 16]))
def test_loads_differ_by_the_largest_count_at_most(counts: dict[int, int], num_experts: int) -> None:
    table = balanced_table(counts, num_experts)
    loads = [0] * num_experts
    for i, count in counts.items():
        if count:
            loads[table[i]] += count
    assert max(loads) - min(loads) <= max(counts.values(), default=0)
    assert {i for i, expert in enumerate(table) if expert >= 0} == {i for i, c in counts.items() if c}
    again = balanced_table(dict(reversed(counts.items())), num_experts)  # the file's order is no matter
    assert again == table


def test_a_worked_example(tmp_path: Path) -> None:
    """Largest first: 5 to expert 0, 4 to 1; id 1 before its equal 7; 9 has no count."""
    path = written(tmp_path, {"9": 0, "7": 3, "4": 5, "1": 3, "0": 4, "2": 1})
    router = hash_router(path, 2)
    assert router.table_V.tolist() == [1, 1, 1, -1, 0, -1, -1, 0]
    assert router.table_V.dtype is torch.int64
    assert experts_of(router, [7, 4, 1, 0, 2, 4]) == [0, 0, 1, 1, 1, 0]


def of_clusters(path: str, num_experts: int = 3, **options: object) -> Router:
    return build_router("hash", d_model=3, num_experts=num_experts, top_k=1, clusters=path, **options)


def test_a_cluster_has_one_expert_and_dispersed_all_of_them(tmp_path: Path) -> None:
    clusters = {5: 2, 0: 1, 3: 1, 9: 1, 4: 0, 7: 1, 12: 2}
    path = written(tmp_path, {str(i): cluster for i, cluster in clusters.items()})
    ids = [0, 3, 4, 5, 7, 9, 12]
    assert experts_of(of_clusters(path), ids) == [clusters[i] for i in ids]
    # in turn: 4 of cluster 0, then 0, 3, 7, 9 of cluster 1, then 5, 12 of cluster 2
    turns = dict(zip([4, 0, 3, 7, 9, 5, 12], [0, 1, 2, 0, 1, 2, 0], strict=True))
    assert experts_of(of_clusters(path, dispersed=True), ids) == [turns[i] for i in ids]
    unseen = [1, 2, 6, 8, 10, 11, 13, 100]
    assert experts_of(of_clusters(path), unseen) == experts_of(hash_router(None, 3), unseen)
    router = of_clusters(path).eval()
    assert experts_of(router, ids) == [clusters[i] for i in ids]
    other = of_clusters(path, dispersed=True)
    other.load_state_dict(router.state_dict())
    assert experts_of(other, ids) == experts_of(router, ids)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.integers(0, 60), st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 7))
def test_dispersed_clusters_are_even_over_experts(clusters: dict[int, int], num_experts: int) -> None:
    table = dispersed_table(clusters, num_experts)
    for group in [list(clusters), *([i for i in clusters if clusters[i] == c] for c in range(10))]:
        loads = [sum(table[i] == expert for i in group) for expert in range(num_experts)]
        assert max(loads) - min(loads) <= 1
    assert {i for i, expert in enumerate(table) if expert >= 0} == set(clusters)


def test_tables_that_cannot_be(tmp_path: Path) -> None:
    path, negative = written(tmp_path, {"3": 4, "1": 0}), tmp_path / "negative.json"
    negative.write_text('{"1": -1}')
    for options, words in (
        ({"clusters": path}, "has a cluster 4, but there are 3 experts"),
        ({"clusters": path, "frequencies": path}, "are two tables"),
        ({"dispersed": True}, "router.dispersed=true is of clusters"),
        ({"clusters": path, "top_k": 2}, "router.clusters gives one expert an id, not 2"),
        ({"clusters": "/nowhere"}, "router.clusters=/nowhere"),
        ({"clusters": str(negative)}, "token id '1' must have a cluster from 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            build_router("hash", d_model=3, num_experts=3, **{"top_k": 1, **options})


def test_the_preset_is_one_expert_at_random() -> None:
    router = compose_train(["router=hash"]).router
    assert (router.top_k, router.frequencies, router.clusters) == (1, None, None)  # type: ignore[attr-defined]


def test_ids_without_a_count_fall_back_on_the_hash(tmp_path: Path) -> None:
    router, plain = hash_router(written(tmp_path, {"3": 2, "8": 1, "5": 0})), hash_router(None)
    unseen = [0, 1, 2, 4, 5, 6, 7, *range(9, 40), 10**6]
    assert experts_of(router, unseen) == experts_of(plain, unseen)
    assert experts_of(router, [3, 8]) == [0, 1]
    assert "table_V" not in plain.state_dict()


def test_the_table_travels_with_the_state_and_through_casts(tmp_path: Path) -> None:
    router = hash_router(written(tmp_path, {str(i): 40 - i for i in range(40)})).bfloat16()
    other = hash_router(written(tmp_path, {str(i): 7 for i in range(40)}))
    ids = list(range(40))
    assert experts_of(other, ids) != experts_of(router, ids)
    other.load_state_dict(router.state_dict())
    assert other.table_V.dtype is torch.int64
    assert experts_of(other, ids) == experts_of(router, ids)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("{", "cannot be read: no JSON text"),
        ("[" * 10**6, "cannot be read: no JSON text"),
        ([1, 2], "must hold an object"),
        ({}, "must hold an object"),
        ({"the": 3}, "'the' is not a token id"),
        ({"-1": 3}, "'-1' is not a token id"),
        ({"²": 3}, "is not a token id"),
        ({str(2**24): 3}, "is not a token id"),
        ({"9" * 5000: 3}, "is not a token id"),
        ({"01": 3}, "write token id '01' as '1'"),
        ({"1": -3}, "token id '1' must have a count"),
        ({"1": 0.5}, "token id '1' must have a count"),
        ({"1": True}, "token id '1' must have a count"),
        ({"1": 2**63}, "token id '1' must have a count"),
        ('{"1": ' + "9" * 5000 + "}", "cannot be read: no JSON text"),
        ('{"1": NaN}', "token id '1' must have a count"),
    ],
)
def test_a_malformed_file_is_one_line(tmp_path: Path, counts: Any, message: str) -> None:
    path = written(tmp_path, counts)
    with pytest.raises(ValueError, match=r"router\.frequencies=") as refused:
        hash_router(path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "counts.json")
    with pytest.raises(ValueError, match="it is not a regular file"):
        hash_router(str(tmp_path / "counts.json"))


def test_a_missing_file_and_a_second_expert_are_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"router\.frequencies=.*none\.json: cannot read .*: No such file"):
        hash_router(missing)
    path = written(tmp_path, {"1": 2})
    with pytest.raises(ValueError, match=r"router\.frequencies gives one .* not 2: set router\.top_k=1"):
        build_router("hash", d_model=3, num_experts=5, frequencies=path)
    with pytest.raises(UserError, match=r"router=hash: router\.frequencies=.* cannot read"):
        validate(compose_train(["router=hash", "router.top_k=1", f"router.frequencies={missing}"]))
    validate(compose_train(["router=hash", "router.top_k=1", f"router.frequencies={path}"]))
