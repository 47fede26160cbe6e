"""Made-up batches that are hard on a layout: padding, ranks without a token, skew, everything on one expert.

Shapes: B sequences, S positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moetrain.data import Batch
from moetrain.data.batch import IGNORE

# Of eight sequences, the tokens that are no padding, and how many of them have a target. The last quarter has
# no target at all, and the sixth sequence not a single token.
LENGTHS = (11, 3, 8, 1, 11, 0, 5, 9)
TARGETS = (10, 2, 7, 1, 4, 0, 0, 0)


@dataclass(frozen=True)
class Scenario:
    """A batch of the whole step, cut into ``micro_batches`` on each rank."""

    name: str
    whole: Batch
    micro_batches: int = 1


def scenarios(sequences: int, seq: int, vocab: int, ranks: int, alone: bool) -> list[Scenario]:
    """What every layout must survive. ``sequences`` is a multiple of twice the ``ranks``.

    ``alone``: whether each token is routed by itself. Routers that couple tokens balance them by
    construction, and of tokens that are exactly alike they choose by the last bit.
    """
    ordinary = mixed(sequences, seq, vocab, seed=0)
    found = [
        Scenario("padded, accumulated", ordinary, 2),
        Scenario("a rank without tokens", without_last(ordinary, sequences // ranks)),
        Scenario("skewed", skewed(mixed(sequences, seq, vocab, seed=1))),
    ]
    return [*found, Scenario("all on one expert", alike(ordinary))] if alone else found


def mixed(sequences: int, seq: int, vocab: int, seed: int) -> Batch:
    """Random tokens; sequences of uneven lengths, each of two documents, the second from its middle on.

    No two documents begin alike, as far as the vocabulary goes: else their first tokens would be.
    """
    draw = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(0, vocab, (sequences, seq + 1), generator=draw)
    place_S = torch.arange(seq)
    row_B = torch.arange(sequences) % len(LENGTHS)
    lengths_B1, targets_B1 = torch.tensor(LENGTHS)[row_B, None], torch.tensor(TARGETS)[row_B, None]
    start_B1 = (lengths_B1 + 1) // 2
    valid_BS = place_S < lengths_B1
    second_BS = (place_S >= start_B1) & valid_BS
    first_B2 = (torch.randperm(max(vocab, 2 * sequences), generator=draw) % vocab)[: 2 * sequences].view(
        -1, 2
    )
    ids_BT[:, 0] = first_B2[:, 0]
    ids_BT.scatter_(1, start_B1, first_B2[:, 1:])
    return _counted(
        Batch(
            input_ids_BS=ids_BT[:, :-1].contiguous(),
            labels_BS=ids_BT[:, 1:].where(place_S < targets_B1, IGNORE),
            doc_ids_BS=second_BS + 2 * ~valid_BS,
            positions_BS=place_S - second_BS * start_B1,
            sample_ids_B=torch.arange(sequences) + 5 * sequences,  # of the sixth step of a run
            domain_ids_BS=torch.zeros(sequences, seq, dtype=torch.int64),
            byte_counts_BS=torch.ones(sequences, seq, dtype=torch.int64),
            valid_BS=valid_BS,
            num_targets=0,
            token_domains_BS=(torch.arange(sequences)[:, None] + second_BS) % 3,
        )
    )


def without_last(whole: Batch, sequences: int) -> Batch:
    """The last sequences are padding throughout: with them, the last rank has not a single token."""
    assert whole.valid_BS is not None
    kept_B1 = torch.arange(whole.valid_BS.shape[0])[:, None] < whole.valid_BS.shape[0] - sequences
    labels_BS = whole.labels_BS.where(kept_B1, IGNORE)
    return _counted(replace(whole, valid_BS=whole.valid_BS & kept_B1, labels_BS=labels_BS))


def skewed(whole: Batch) -> Batch:
    """Three of four tokens are the same word, but for those that begin a document."""
    assert whole.positions_BS is not None
    place_BS = torch.arange(whole.input_ids_BS.numel()).view_as(whole.input_ids_BS)
    kept_BS = (place_BS % 4 == 0) | (whole.positions_BS == 0)
    return replace(whole, input_ids_BS=whole.input_ids_BS.where(kept_BS, 3))


def alike(whole: Batch) -> Batch:
    """All tokens alike, at one position and alone: every router of scores sends them the same way."""
    return replace(
        whole,
        input_ids_BS=torch.full_like(whole.input_ids_BS, 3),
        doc_ids_BS=torch.arange(whole.input_ids_BS.numel()).view_as(whole.input_ids_BS),
        positions_BS=torch.zeros_like(whole.input_ids_BS),
    )


def without_targets(whole: Batch) -> Batch:
    """Nothing to predict: what gradient remains is that of the balance losses."""
    return _counted(replace(whole, labels_BS=torch.full_like(whole.labels_BS, IGNORE)))


def cut(whole: Batch, micro: int, rank: int = 0, world: int = 1) -> list[Batch]:
    """The micro-batches of ``micro`` sequences in a rank's contiguous share."""
    share = whole.sample_ids_B.shape[0] // world
    pieces = []
    for start in range(rank * share, (rank + 1) * share, micro):
        rows = slice(start, min(start + micro, (rank + 1) * share))
        tensors: dict[str, Any] = {n: x[rows] for n, x in vars(whole).items() if isinstance(x, Tensor)}
        pieces.append(_counted(replace(whole, **tensors)))
    return pieces


def _counted(batch: Batch) -> Batch:
    return replace(batch, num_targets=int((batch.labels_BS != IGNORE).sum()))
