"""Hash routing: the expert is a fixed function of the token's id (Roller et al. 2021, arXiv:2106.04426).

Shapes: T tokens, E experts, K top-k, V token ids that the table knows.
"""

from __future__ import annotations

import heapq
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from moetrain.errors import UserError
from moetrain.moe.assign import from_token_choice
from moetrain.moe.combine import Combine
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import Router, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.ops.counter import mix

_MAX_IDS = 2**24  # a stray large id must not ask for gigabytes
_MAX_BYTES = 100 * 10**6


@dataclass(frozen=True)
class HashOptions(RouterConfig):
    name: str = "hash"
    top_k: Optional[int] = None  # different experts for one id, of weight 1 / k each
    salt: int = 0  # another table
    frequencies: Optional[str] = None  # a JSON file {token id: count}; null: ids alike; needs top_k 1

    def combine(self, num_experts: int) -> Combine:
        k = resolve_top_k(self.top_k, num_experts)
        return Combine(top_k=k, even_weight=1 / k, total=1.0, drops=self.drops)


@register("hash", HashOptions, "Roller et al. 2021, arXiv:2106.04426", "k experts of a token id")
class HashRouter(Router):
    """A pseudo-random table, computed and not stored; with ``frequencies`` a balanced one.

    The balanced table gives each id one expert. It is built once, from the file, and is then part of the
    state (``table_V``); ids that the file lacks, or counts 0 times, fall back on the hash. No parameters, no
    scores, no balance loss.

    Raises ValueError where the context has no token ids, for a file that cannot be read or is malformed, and
    for ``frequencies`` with ``top_k`` above 1.
    """

    options: HashOptions
    top_k: int
    has_scores = has_logits = False
    table_V: Tensor

    def __init__(self, d_model: int, num_experts: int, options: HashOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)
        if options.frequencies is not None:
            if self.top_k > 1:
                raise ValueError(
                    f"router.frequencies gives one expert an id, not {self.top_k}: set router.top_k=1"
                )
            table = balanced_table(read_frequencies(options.frequencies), num_experts)
            self.register_buffer("table_V", torch.tensor(table, dtype=torch.int64))

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        if ctx.token_ids_T is None:
            raise ValueError("router=hash needs token ids: give the layer a RouterContext with token_ids_T")
        ids_T = ctx.token_ids_T.to(torch.int64)
        ids_TK = expert_keys(ids_T, self.num_experts, self.options.salt).topk(self.top_k, dim=-1).indices
        if self.options.frequencies is not None:
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


def read_frequencies(path: str) -> dict[int, int]:
    """Token id -> count, of a JSON object whose keys are ids below 2^24 in decimal and whose values count.

    Raises ValueError, in one line, for a file that cannot be read or holds anything else.
    """
    from moetrain.files import read_bytes  # with it comes pydantic, which layers do without

    try:
        counts = json.loads(read_bytes(Path(path), _MAX_BYTES).decode("utf-8"))
    except UserError as e:
        raise ValueError(f"router.frequencies={path}: {e}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"router.frequencies={path} cannot be read: no JSON text") from None
    if not isinstance(counts, dict) or not counts:
        raise ValueError(f"router.frequencies={path} must hold an object of {{token id: count}}")
    for key, count in counts.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 9 and int(key) < _MAX_IDS):
            raise ValueError(f"router.frequencies={path}: {key[:40]!r} is not a token id from 0 to 2^24 - 1")
        if type(count) is not int or not 0 <= count < 2**63:
            raise ValueError(f"router.frequencies={path}: token {key} must have a count from 0 to 2^63 - 1")
        if str(int(key)) != key:
            raise ValueError(f"router.frequencies={path}: write token id {key!r} as {str(int(key))!r}")
    return {int(key): count for key, count in counts.items()}


def balanced_table(counts: dict[int, int], num_experts: int) -> list[int]:
    """The expert of each id from 0 to the largest counted one, -1 where there is no count.

    Greedy: ids by falling count (ties: the lower id) go to the expert with the least so far (ties: the lower
    expert), so that no two experts' loads differ by more than the largest count (Roller et al. 2021).
    """
    seen = sorted((i for i, count in counts.items() if count), key=lambda i: (-counts[i], i))
    table = [-1] * (max(seen, default=-1) + 1)
    loads = [(0, expert) for expert in range(num_experts)]
    for i in seen:
        load, table[i] = loads[0]
        heapq.heapreplace(loads, (load + counts[i], table[i]))
    return table or [-1]
