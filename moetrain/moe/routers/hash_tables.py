"""Tables from token ids to experts, of the hash router (Roller et al. 2021, arXiv:2106.04426)."""

from __future__ import annotations

import heapq
import json
from pathlib import Path

from moetrain.errors import UserError

_MAX_IDS = 2**24  # a stray large id must not ask for gigabytes
_MAX_BYTES = 100 * 10**6


def read_numbers(path: str, option: str, what: str) -> dict[int, int]:
    """Token id -> number, of a JSON object whose keys are ids below 2^24 in decimal and whose values count.

    Arguments and errors are :func:`read_counts`'s.
    """
    counts = read_counts(path, option, what, "token id")
    for key in counts:
        if not is_token_id(key):
            raise ValueError(f"router.{option}={path}: {key[:40]!r} is not a token id from 0 to 2^24 - 1")
        if str(int(key)) != key:
            raise ValueError(f"router.{option}={path}: write token id {key!r} as {str(int(key))!r}")
    return {int(key): count for key, count in counts.items()}


def read_counts(path: str, option: str, what: str, of: str) -> dict[str, int]:
    """A JSON object with a number from 0 to 2^63 - 1 for each key.

    ``option``, ``what``, ``of``: for messages, the router's option that names the file, what its numbers are,
    and what its keys are. Raises ValueError, in one line, for a file that cannot be read or holds anything
    else.
    """
    from moetrain.files import read_bytes  # with it comes pydantic, which layers do without

    try:
        counts = json.loads(read_bytes(Path(path), _MAX_BYTES).decode("utf-8"))
    except UserError as e:
        raise ValueError(f"router.{option}={path}: {e}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"router.{option}={path} cannot be read: no JSON text") from None
    if not isinstance(counts, dict) or not counts:
        raise ValueError(f"router.{option}={path} must hold an object of {{{of}: {what}}}")
    for key, count in counts.items():
        if type(count) is not int or not 0 <= count < 2**63:
            raise ValueError(
                f"router.{option}={path}: {of} {key[:40]!r} must have a {what} from 0 to 2^63 - 1"
            )
    return counts


def is_token_id(text: str) -> bool:
    """Whether it is an id from 0 to 2^24 - 1, in decimal."""
    return text.isascii() and text.isdecimal() and len(text) < 9 and int(text) < _MAX_IDS


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


def clustered_table(clusters: dict[int, int]) -> list[int]:
    """The expert of each id from 0 to the largest: its cluster's number; -1 where the id has no cluster."""
    table = [-1] * (max(clusters) + 1)
    for i, cluster in clusters.items():
        table[i] = cluster
    return table


def dispersed_table(clusters: dict[int, int], num_experts: int) -> list[int]:
    """The same, where each cluster's ids, in ascending order, go to the experts in turn.

    So ids that are alike go to different experts. Each cluster begins where the one before ended.
    """
    table = [-1] * (max(clusters) + 1)
    for turn, i in enumerate(sorted(clusters, key=lambda i: (clusters[i], i))):
        table[i] = turn % num_experts
    return table
