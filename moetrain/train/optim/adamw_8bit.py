"""AdamW whose moments are kept in 8 bits: a code an element, and one fp32 scale for every 256 of them.

The update and its rounding are bitsandbytes' (Dettmers et al. 2022, arXiv:2110.02861): moments of this rank's
part of a parameter, laid flat, in blocks of 256. A code stands for a value of a table in [-1, 1], times its
block's largest magnitude.

A checkpoint holds the moments in fp32 under AdamW's names. Here codes become values, and values codes, such
that codes -> values -> codes is the identity, whichever device made them. The library's own pair is not: its
table of signed values ends at -0.993, so that a block whose largest element is negative comes back smaller.

Shapes: N elements of this rank's part, B blocks of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from moetrain.errors import UserError
from moetrain.ops.local_part import local_part
from moetrain.train.optim.chained import ChainedOptimizer

BLOCK = 256  # bitsandbytes' for optimizer states
_PIECE = 2**26  # elements at once: less temporary memory, and CUDA's kernel counts them in int32
_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW8bit(ChainedOptimizer):
    """8-bit AdamW on ``groups``, torch's AdamW on ``adamw_groups``; both are ordinary parameter groups.

    State of a parameter of ``groups``, of its part on this rank: ``exp_avg_codes`` and ``exp_avg_sq_codes``,
    uint8 [N], ``exp_avg_absmax`` and ``exp_avg_sq_absmax``, fp32 [B]. Weight decay is decoupled.
    ``adamw_options`` has ``betas`` and ``eps``, which are those of both. Parameters are fp32.
    ``checkpoint/state_dict.py`` saves and restores the state; torch's ``load_state_dict`` would cast codes.
    Raises UserError where bitsandbytes cannot update on the parameters' device.
    """

    def __init__(
        self, groups: list[dict[str, Any]], adamw_groups: list[dict[str, Any]], adamw_options: dict[str, Any]
    ) -> None:
        adamw = AdamW(adamw_groups, **adamw_options) if adamw_groups else None
        own = [
            {**group, **{key: adamw_options[key] for key in ("betas", "eps")}, "bits": 8} for group in groups
        ]
        super().__init__([*own, *(adamw.param_groups if adamw else [])], adamw, "bits")
        self._encoded = {p for group in own for p in group["params"]}
        self._steps: dict[Tensor, int] = {}
        for device in {p.device for p in self._encoded}:
            _try_on(device)

    def encodes(self, p: Tensor) -> bool:
        """Whether the moments of ``p`` are kept in 8 bits."""
        return p in self._encoded

    @torch.no_grad()
    def decoded(self, p: Tensor) -> dict[str, Tensor]:
        """AdamW's state of ``p``, fp32 copies on the CPU, placed as ``p`` is; zeros before a first step."""
        found = {"step": torch.tensor(float(self._steps.get(p, 0)))}
        for key, table in zip(_MOMENTS, _checkpoint_tables(p.device), strict=True):
            found[key] = torch.zeros_like(p, device="cpu", memory_format=torch.contiguous_format)
            flat_N = local_part(found[key]).view(-1)
            if p in self._steps:
                for codes, absmax, values in self._pieces(p, key, flat_N):
                    values.copy_(decode(codes, absmax, table))
        return found

    @torch.no_grad()
    def encode(self, p: Tensor, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`decoded` gives, with other values."""
        self._steps[p] = int(state["step"])
        self._make_state(p)
        for key, table in zip(_MOMENTS, _checkpoint_tables(p.device), strict=True):
            flat_N = local_part(state[key]).reshape(-1)
            for codes, absmax, values in self._pieces(p, key, flat_N):
                new_codes, new_absmax = encode(values.to(codes.device), table)
                codes.copy_(new_codes)
                absmax.copy_(new_absmax)

    def _make_state(self, p: Tensor) -> None:
        local = local_part(p)
        blocks = -(-local.numel() // BLOCK)
        for key in _MOMENTS:
            self.state[p][f"{key}_codes"] = torch.zeros(local.numel(), dtype=torch.uint8, device=local.device)
            self.state[p][f"{key}_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=local.device)

    def _pieces(self, p: Tensor, key: str, flat_N: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Views of whole blocks: codes and scales of one moment, and of ``flat_N``."""
        codes_N, absmax_B = self.state[p][f"{key}_codes"], self.state[p][f"{key}_absmax"]
        return zip(codes_N.split(_PIECE), absmax_B.split(_PIECE // BLOCK), flat_N.split(_PIECE), strict=True)

    def _step_own(self, p: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        if p not in self._steps:
            self._make_state(p)
        self._steps[p] = self._steps.get(p, 0) + 1  # of ranks that hold nothing of it, too
        local, local_grad = local_part(p), local_part(grad)
        if not local.numel():
            return
        local.mul_(1 - group["lr"] * group["weight_decay"])  # CUDA's kernel would decay after its update
        weights_N = local.contiguous().view(-1)  # a view, unless the parameter has strides of its own
        grads_N = local_grad.contiguous().view(-1)
        moments = zip(
            self._pieces(p, _MOMENTS[0], weights_N), self._pieces(p, _MOMENTS[1], grads_N), strict=True
        )
        for (codes, absmax, weights), (codes_sq, absmax_sq, grads) in moments:
            _update(group, self._steps[p], weights, grads, (codes, codes_sq), (absmax, absmax_sq))
        if not local.is_contiguous():
            local.copy_(weights_N.view_as(local))


def decode(codes_N: Tensor, absmax_B: Tensor, table: Tensor) -> Tensor:
    """The fp32 values [N] that codes stand for; no zero has a sign."""
    values_N = table.index_select(0, codes_N.int())
    return values_N.mul_(absmax_B.repeat_interleave(BLOCK)[: codes_N.numel()]).add_(0.0)


def encode(values_N: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The codes [N] of the table's nearest values, and the largest magnitude of each block [B].

    The table's ends are 1 and, of signed values, -1, so that a block's largest element is kept to the bit.
    """
    padded = torch.nn.functional.pad(values_N, (0, -values_N.numel() % BLOCK)).view(-1, BLOCK)
    absmax_B = padded.abs().amax(1)
    relative = padded / absmax_B.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(relative, (table[1:] + table[:-1]) / 2, out_int32=True)
    return codes.view(-1)[: values_N.numel()].to(torch.uint8), absmax_B


@cache
def _library() -> Any:
    # At its import it may warn of kernels that it does not find, which are for other things than optimizers.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes import functional

    return functional


@cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """bitsandbytes' 256 values of signed and of unsigned codes, fp32, ascending; made once a device."""
    create = _library().create_dynamic_map
    return create(signed=True).to(device), create(signed=False).to(device)


def _checkpoint_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The same, where the lowest signed code stands for -1.

    It is the code of whatever element made its block's scale, if that is negative.
    """
    signed, unsigned = tables(device)
    return torch.cat([signed.new_tensor([-1.0]), signed[1:]]), unsigned


def _update(
    group: Mapping[str, Any],
    step: int,
    weights_N: Tensor,
    grads_N: Tensor,
    codes_N: tuple[Tensor, Tensor],
    absmax_B: tuple[Tensor, Tensor],
) -> None:
    """In place, of all but the gradients; ``codes_N`` and ``absmax_B`` of the first and the second moment."""
    signed, unsigned = tables(weights_N.device)
    beta1, beta2 = group["betas"]
    _library().optimizer_update_8bit_blockwise(
        "adam",
        g=grads_N,
        p=weights_N,
        state1=codes_N[0],
        state2=codes_N[1],
        beta1=beta1,
        beta2=beta2,
        beta3=0.0,
        alpha=0.0,
        eps=group["eps"],
        step=step,
        lr=float(group["lr"]),
        qmap1=signed,
        qmap2=unsigned,
        absmax1=absmax_B[0],
        absmax2=absmax_B[1],
    )


def _try_on(device: torch.device) -> None:
    """Raise UserError where the library has no update for ``device``, on zeros."""
    group = {"betas": (0.9, 0.99), "eps": 1e-8, "lr": 0.0}
    zeros = torch.zeros(4, BLOCK, device=device)
    codes, scales = torch.zeros(2, BLOCK, dtype=torch.uint8, device=device), torch.zeros(2, 1, device=device)
    try:
        _update(group, 1, zeros[0], zeros[1], (codes[0], codes[1]), (scales[0], scales[1]))
    except RuntimeError as error:
        told = str(error).strip().splitlines()[0]
        raise UserError(
            f"optim=adamw_8bit: bitsandbytes cannot update on {device}: {told}: python -m bitsandbytes says "
            "more; or set optim=adamw"
        ) from error
