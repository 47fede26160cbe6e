"""Names of a decoder's feed-forward tensors."""

from __future__ import annotations

from collections.abc import Iterable

EXPERTS = ("experts.w_gate_up_EDCF", "experts.w_down_EFD")
SHARED = "shared."
GATE = "w_gate_FD"
SHARED_GATE = "shared_gate_1D"
OPTIM = "optim."


def dense_names(gated: bool, within: str = "") -> tuple[str, ...]:
    """The matrices of a dense network: gate where there is one, up, down; ``within``: the module's prefix."""
    leaves = (GATE, "w_up_FD", "w_down_DF") if gated else ("w_up_FD", "w_down_DF")
    return tuple(within + leaf for leaf in leaves)


def router_rows(names: Iterable[str], layer: int) -> list[str]:
    """Of a decoder's tensors, by name within the layer, those of its router with a row of each expert."""
    start = prefix(layer) + "router."
    inner = (name.removeprefix(start) for name in names if name.startswith(start))
    return sorted(f"router.{name}" for name in inner if name.rpartition("_")[2].startswith("E"))


def prefix(layer: int) -> str:
    return f"blocks.{layer}.feed_forward."


def owner(optim_name: str) -> str:
    """The parameter that ``optim.<parameter>.<key>`` belongs to."""
    return optim_name.removeprefix(OPTIM).rpartition(".")[0]
