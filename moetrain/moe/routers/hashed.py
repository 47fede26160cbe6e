"""Hash routing: the expert is a fixed function of the token's id (Roller et al. 2021, arXiv:2106.04426).

Shapes: T tokens, E experts, K top-k, V token ids that the table knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from moetrain.moe.assign import from_token_choice
from moetrain.moe.combine import Combine
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import Router, register, resolve_top_k
from moetrain.moe.routers.hash_tables import balanced_table, clustered_table, dispersed_table, read_numbers
from moetrain.moe.routing import Routing
from moetrain.ops.counter import mix


@dataclass(frozen=True)
class HashOptions(RouterConfig):
    name: str = "hash"
    top_k: Optional[int] = None  # different experts for one id, of weight 1 / k each
    salt: int = 0  # another table
    # tables from JSON files, for top_k 1; null: none, and ids are hashed
    frequencies: Optional[str] = None  # {token id: count}: balanced by these
    clusters: Optional[str] = None  # {token id: cluster}: each cluster's ids to one expert, or
    dispersed: bool = False  # to all experts in turn

    def combine(self, num_experts: int) -> Combine:
        k = resolve_top_k(self.top_k, num_experts)
        return Combine(top_k=k, even_weight=1 / k, total=1.0, drops=self.drops)


@register("hash", HashOptions, "Roller et al. 2021, arXiv:2106.04426", "k experts of a token id")
class HashRouter(Router):
    """A pseudo-random table, computed and not stored; with a file a balanced, clustered or dispersed one.

    A table gives each id one expert. It is built once, from the file, and is then part of the state
    (``table_V``); ids that the file lacks, or counts 0 times, fall back on the hash. No parameters, no
    scores, no balance loss.

    Raises ValueError where the context has no token ids, for a file that cannot be read or is malformed, for
    one with ``top_k`` above 1, and for options of two tables.
    """

    options: HashOptions
    top_k: int
    has_scores = has_logits = False
    table_V: Tensor

    def __init__(self, d_model: int, num_experts: int, options: HashOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)
        table = self._table()
        if table is not None:
            self.register_buffer("table_V", torch.tensor(table, dtype=torch.int64))

    def _table(self) -> list[int] | None:
        """The expert of each id of the file, -1 where it has none; None: there is no file."""
        options = self.options
        if options.dispersed and options.clusters is None:
            raise ValueError("router.dispersed=true is of clusters: set router.clusters, or dispersed=false")
        given = [key for key in ("frequencies", "clusters") if getattr(options, key) is not None]
        if len(given) > 1:
            raise ValueError("router.frequencies and router.clusters are two tables: set one of them to null")
        if given and self.top_k > 1:
            raise ValueError(
                f"router.{given[0]} gives one expert an id, not {self.top_k}: set router.top_k=1"
            )
        if options.frequencies is not None:
            return balanced_table(read_numbers(options.frequencies, "frequencies", "count"), self.num_experts)
        if options.clusters is None:
            return None
        clusters = read_numbers(options.clusters, "clusters", "cluster")
        if options.dispersed:
            return dispersed_table(clusters, self.num_experts)
        if (largest := max(clusters.values())) >= self.num_experts:
            raise ValueError(
                f"router.clusters={options.clusters} has a cluster {largest}, but there are "
                f"{self.num_experts} experts: number clusters from 0, or set router.dispersed=true"
            )
        return clustered_table(clusters)

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        if ctx.token_ids_T is None:
            raise ValueError("router=hash needs token ids: give the layer a RouterContext with token_ids_T")
        ids_T = ctx.token_ids_T.to(torch.int64)
        ids_TK = expert_keys(ids_T, self.num_experts, self.options.salt).topk(self.top_k, dim=-1).indices
        if "table_V" in self._buffers:
            last = len(self.table_V) - 1
            known_T = self.table_V[ctx.token_ids_T.clamp(0, last)]
            unseen_T = (known_T < 0) | (ctx.token_ids_T < 0) | (ctx.token_ids_T > last)
            ids_TK = torch.where(unseen_T[:, None], ids_TK, known_T[:, None])
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        weights_TK = torch.full(ids_TK.shape, 1 / self.top_k, dtype=dtype, device=ids_TK.device)
        return from_token_choice(ids_TK, weights_TK, ctx, self.num_experts)


def expert_keys(ids_T: Tensor, num_experts: int, salt: int) -> Tensor:
    """A hash of each (id, expert), int64 [T, E]: an id's k largest are k different experts, each uniform."""
    key_T = mix(ids_T + mix(ids_T.new_full((), salt)))
    return mix(key_T[:, None] + torch.arange(num_experts, device=key_T.device))
