"""Batches for training, in an order that depends on the seed alone, and for evaluation.

Optimizer step s consumes the positions s*G to s*G + G - 1 of the run, G sequences; rank r of W takes the
r-th contiguous share of them and cuts it into micro-batches. The state is one number.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moetrain.data.batch import Batch
from moetrain.data.documents import digest_of
from moetrain.data.order import Order
from moetrain.data.packing import PackedSplit
from moetrain.errors import UserError


class TrainLoader:
    """One rank's batches, the next step's prepared by a thread while this one trains.

    The rank's share of G need not be a multiple of ``micro_batch_size``: its last micro-batch is then
    smaller. ``sample_ids_B`` are the positions of the run: unique over epochs. Raises UserError when G does
    not divide by the number of ranks. An error of the thread is raised by ``next_step``.
    """

    def __init__(
        self,
        split: PackedSplit,
        order: Order,
        micro_batch_size: int,
        global_batch_sequences: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if global_batch_sequences < 1 or global_batch_sequences % world:
            raise UserError(
                f"train.global_batch_tokens gives {global_batch_sequences} sequences a step, which {world} "
                "ranks cannot share equally: make it a multiple of data.seq_len * ranks"
            )
        if micro_batch_size < 1:
            raise UserError(f"train.micro_batch_size={micro_batch_size}: must be at least 1")
        self._split, self._order = split, order
        self._micro, self._global = micro_batch_size, global_batch_sequences
        self._rank, self._world = rank, world
        self._samples = 0  # positions consumed: the run's place in its data
        self._fetch: _Fetch | None = None

    @property
    def samples(self) -> int:
        return self._samples

    def next_step(self) -> list[Batch]:
        fetch = self._fetch if self._fetch is not None else _Fetch(self, self._samples)
        self._fetch = None
        batches = fetch.result()
        self._samples += self._global
        self._fetch = _Fetch(self, self._samples)
        return batches

    def build(self, start: int) -> list[Batch]:
        """This rank's micro-batches of the step that begins at position ``start``; changes nothing."""
        share = self._global // self._world
        first = start + self._rank * share
        batches = []
        for offset in range(0, share, self._micro):
            positions = first + np.arange(offset, min(offset + self._micro, share), dtype=np.int64)
            batches.append(self._split.batch(self._order(positions), positions))
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Where the next step begins, and what the order was made from. The same on every rank."""
        return {"samples": self._samples, "seed": self._order.seed, "fingerprint": self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``. Raises UserError when it belongs to other data or to another seed."""
        self.check_state_dict(state)
        self._fetch = None
        self._samples = int(state["samples"])

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises as :meth:`load_state_dict` does, and changes nothing."""
        if state["seed"] != self._order.seed:
            raise UserError(
                f"resume: the checkpoint was trained with train.seed={state['seed']}, this run has "
                f"{self._order.seed}: use the same seed, or resume=none"
            )
        if state["fingerprint"] != self._fingerprint():
            raise UserError(
                f"resume: the checkpoint was trained on other data ({state['fingerprint'][:12]}, now "
                f"{self._fingerprint()[:12]}): restore the text, the tokenizer, data.seq_len and the parts' "
                "weights, or use resume=none"
            )

    def _fingerprint(self) -> str:
        return digest_of(self._split.fingerprint, self._order.description)

    def close(self) -> None:
        """Forget the step being prepared. Its thread is a daemon: nothing ever waits for it."""
        self._fetch = None


class _Fetch:
    """One step being built in a thread of its own, so that there is no queue to block on."""

    def __init__(self, loader: TrainLoader, start: int) -> None:
        self._batches: list[Batch] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(loader, start), name="moetrain-data", daemon=True
        )
        self._thread.start()

    def _run(self, loader: TrainLoader, start: int) -> None:
        try:
            self._batches = loader.build(start)
        except BaseException as error:
            self._error = error

    def result(self) -> list[Batch]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._batches is not None
        return self._batches


def val_batches(
    split: PackedSplit, batch_size: int, limit: int | None = None, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """This rank's share of the held-out sequences, or of ``limit`` of them spread evenly over the split.

    All ranks get the same number of batches, of the same shapes, so that they can meet in collectives; where
    the sequences do not divide by the ranks, a rank's last row is blank (padding, no labels). Together the
    ranks score every chosen sequence once. ``sample_ids_B`` are the sequences' indices.
    """
    total = len(split) if limit is None else min(limit, len(split))
    each = -(-total // world)
    for start in range(0, each, batch_size):
        turns = np.arange(start, min(start + batch_size, each), dtype=np.int64) * world + rank
        chosen = np.minimum(turns, total - 1) * len(split) // total
        yield split.batch(chosen, chosen, blank_B=turns >= total)
