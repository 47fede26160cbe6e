"""Routing replay in training, evaluation and generation: what is recorded, and what is forced.

Forced experts get weights from the present scores, whose gradient the router learns by (Ma et al. 2025, R3,
arXiv:2510.11370).

Shapes: B sequences, S positions, T = B S tokens, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moetrain.errors import UserError
from moetrain.moe import Router, RoutingRecord
from moetrain.train.options import ReplayConfig
from moetrain.train.routes import RouteReader, RouteWriter, read_description

if TYPE_CHECKING:
    from moetrain.data import Batch


class Replay:
    """What a step, or an evaluation, records and forces; by default neither."""

    def __init__(self, writer: RouteWriter | None = None, reader: RouteReader | None = None) -> None:
        self._writer, self._reader = writer, reader

    def forced(self, batch: Batch) -> dict[int, Tensor] | None:
        """A layer's place -> the experts [T, K] that the batch's tokens must take; None: their own."""
        if self._reader is None:
            return None
        return self._reader.forced(batch.sample_ids_B, batch.input_ids_BS, batch.valid_BS)

    def add(self, batch: Batch, records: Mapping[int, RoutingRecord]) -> None:
        """Keep what a batch's tokens took."""
        if self._writer is not None:
            self._writer.add(batch.sample_ids_B, batch.input_ids_BS, batch.valid_BS, records)

    def flush(self, name: str) -> None:
        """Write what was kept since the last call."""
        if self._writer is not None:
            self._writer.flush(name)


def open_replay(cfg: ReplayConfig, routers: Mapping[int, Router], main: bool = True) -> Replay:
    """The live side of the section ``replay``. Raises UserError for what cannot be recorded or forced."""
    reader = None if cfg.force is None else RouteReader(Path(cfg.force).expanduser(), routers)
    writer = None if cfg.record is None else RouteWriter(Path(cfg.record).expanduser(), routers, main)
    return Replay(writer, reader)


def check_replay(cfg: ReplayConfig) -> None:
    """Raise UserError where a record cannot be read, or would be written over itself."""
    if cfg.force is None:
        return
    read_description(Path(cfg.force).expanduser())
    if (
        cfg.record is not None
        and Path(cfg.record).expanduser().resolve() == Path(cfg.force).expanduser().resolve()
    ):
        raise UserError(f"replay.record and replay.force are both {cfg.force}: record into another folder")


class OneSequence:
    """The routes of a text that the model reads in several passes, as the sample 0 of a record."""

    def __init__(self, writer: RouteWriter) -> None:
        self._writer, self._tokens, self._ids = writer, list[Tensor](), dict[str, list[Tensor]]()

    def add(self, tokens_BS: Tensor, records: Mapping[int, RoutingRecord]) -> None:
        """The next tokens [1, S], and what each layer's router told of them."""
        self._tokens.append(tokens_BS)
        for name, ids in self._writer.routes(tokens_BS, records).items():
            self._ids.setdefault(name, []).append(ids)

    def write(self) -> None:
        if self._tokens:
            tokens_BS = torch.cat(self._tokens, 1)
            ids = {name: torch.cat(parts, 1) for name, parts in self._ids.items()}
            self._writer.keep(torch.zeros(1, dtype=torch.int64), tokens_BS, None, ids)
            self._writer.flush("text")
