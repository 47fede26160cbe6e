"""The rows of an assignment, one assignment at a time: what kernels/metadata.py makes, its used part.

Shapes: N assignments sorted by (expert, token), E experts, X source rows, B used blocks, R = B * block rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sort_choices(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order of the choices of an expert by (expert, token), counts [E]), int64."""
    ids = ids_TK.flatten().tolist()
    order = sorted((i for i, e in enumerate(ids) if e < num_experts), key=lambda i: ids[i])
    counts = [ids.count(e) for e in range(num_experts)]
    return torch.tensor(order, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64)


def lay_out(
    token_ids_N: Tensor, weights_N: Tensor, counts_E: Tensor, block: int, num_source: int
) -> dict[str, Tensor]:
    """The fields of a ``Metadata`` by name, and ``weights_R``."""
    ids: list[int] = []
    weights: list[float] = []
    slots: list[int] = []
    block_expert: list[int] = []
    starts, block_starts = [0], [0]
    for expert, count in enumerate(counts_E.tolist()):
        mine = slice(len(slots), len(slots) + count)
        slots += range(len(ids), len(ids) + count)
        padding = -count % block
        ids += token_ids_N[mine].tolist() + [-1] * padding
        weights += weights_N[mine].tolist() + [0.0] * padding
        block_expert += [expert] * ((count + padding) // block)
        starts.append(len(slots))
        block_starts.append(len(block_expert))
    by_source = [[row for row, token in enumerate(ids) if token == x] for x in range(num_source)]
    integers = {
        "ids_R": ids,
        "slots_N": slots,
        "starts_E1": starts,
        "block_starts_E1": block_starts,
        "by_source_N": [row for rows in by_source for row in rows],
        "ends_X": [sum(map(len, by_source[: x + 1])) for x in range(num_source)],
    }
    fields = {name: torch.tensor(value, dtype=torch.int64) for name, value in integers.items()}
    fields["block_expert_B"] = torch.tensor(block_expert, dtype=torch.int32)
    fields["weights_R"] = torch.tensor(weights, dtype=weights_N.dtype)
    return fields
