"""What a layout decides of the function that is trained: which experts are local to a token.

It is written into the config, and so into the run's, where a start under another layout is compared with it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from moetrain.train.options import TrainConfig

C = TypeVar("C", bound=TrainConfig)


def of_layout(cfg: C, world: int) -> C:
    """``cfg`` with ``router.local_devices`` and ``local_sequences`` of ``world`` ranks, where a local repair
    leaves either to the layout; unchanged where one device holds all experts.
    """
    router, ep = cfg.router, cfg.parallel.ep
    share = cfg.train.global_batch_tokens // max(cfg.data.seq_len * world, 1)
    if not router.repair.is_local or ep < 2 or share < 1:
        return cfg
    devices = ep if router.local_devices is None else router.local_devices
    sequences = share if router.local_sequences is None else router.local_sequences
    return replace(cfg, router=replace(router, local_devices=devices, local_sequences=sequences))
