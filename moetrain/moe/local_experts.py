"""Which experts lie on a token's own device, for the repair of overflow: by its sequence, not by its rank.

Devices 0 to R - 1 share the E experts in consecutive blocks, and the run's sequences go to them in shares of
``local_sequences``, one device after the other. With R = ``parallel.ep`` and a rank's share of a step, that
is where ranks hold experts and read sequences, and one process can follow the same rule.

Shapes: B sequences of S, T = B S tokens, E experts with a network, Z others, R devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.arithmetic import divisor_near
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig


def device_of(sample_ids_B: Tensor, devices: int, sequences: int) -> Tensor:
    """The device of each sequence of the run, int64 [B]: (id // sequences) mod devices."""
    return sample_ids_B // sequences % devices


def local_experts(
    ctx: RouterContext, num_ffn_experts: int, num_others: int, devices: int, sequences: int
) -> Tensor:
    """bool [T, E + Z]: whether an expert lies on the token's own device. The Z others lie on every one."""
    experts_E = torch.arange(num_ffn_experts, device=ctx.sample_ids_B.device)
    device_E = experts_E // (num_ffn_experts // devices)
    own_BE = device_of(ctx.sample_ids_B, devices, sequences)[:, None] == device_E
    own_BE = torch.cat([own_BE, own_BE.new_ones(ctx.batch, num_others)], 1)
    return own_BE.repeat_interleave(ctx.seq, 0)


def local_refusal(options: RouterConfig, num_experts: int) -> str | None:
    """Why a router over ``num_experts`` with a network cannot have these options; None where it may."""
    devices, sequences, rule = options.local_devices, options.local_sequences, options.repair
    if not rule.is_local:
        for name, value in (("local_devices", devices), ("local_sequences", sequences)):
            if value is not None:
                return (
                    f"router.{name}={value} is of router.repair=local and local_fill_in, not of "
                    f"{rule.name}: leave it out, or set router.repair=local"
                )
        return None
    if devices is None or sequences is None:
        return (
            f"router.repair={rule.name} is of the experts of a token's own device, and one process has them "
            "all, so that no capacity would bind: set parallel.ep, or router.local_devices and "
            "router.local_sequences, to follow the rule of such a layout"
        )
    if num_experts % devices:
        return (
            f"router.local_devices={devices} does not divide the {num_experts} experts: "
            f"take {divisor_near(num_experts, devices)}"
        )
    return None
