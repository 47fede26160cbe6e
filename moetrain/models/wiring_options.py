"""How a block is wired, beyond ``x + attention(norm(x))`` and then ``x + feed_forward(norm(x))``."""

from dataclasses import dataclass, field
from enum import Enum

from moetrain.bounds import above, at_least, within


class Wiring(Enum):
    """``residual``: each MoE layer beside a dense network of width ``model.d_ff``, mixed by two learnt
    coefficients a token (PR-MoE; Rajbhandari et al. 2022, arXiv:2201.05596). ``momentum``: a momentum over
    depth (MomentumSMoE; Teo and Nguyen 2024, arXiv:2410.14574). ``shortcut``: the routed experts read an
    earlier stream, and their rows travel during attention (ScMoE; Cai et al. 2024, arXiv:2404.05019).
    """

    plain = "plain"
    residual = "residual"
    momentum = "momentum"
    shortcut = "shortcut"


class ShortcutFrom(Enum):
    """The stream that a shortcut's router and routed experts read: ``block_input``: before this block's
    attention; ``previous_attention``: after that of the block before (of the first block, its input)."""

    block_input = "block_input"
    previous_attention = "previous_attention"


class RouterInput(Enum):
    """What the router of an MoE layer reads. ``own``: what the experts read. ``pre_attention``: the stream
    before this block's attention and norm (SmallThinker; Song et al. 2025, arXiv:2507.20984).
    ``previous_moe``: what the MoE layer before read; the first its own (Pre-gated MoE; Hwang et al. 2023,
    arXiv:2308.12066)."""

    own = "own"
    pre_attention = "pre_attention"
    previous_moe = "previous_moe"


class MomentumKind(Enum):
    """``heavy_ball``; ``adam``: normalised steps in the first layers; ``robust``: the robust momentum method
    (Cyrus et al. 2018, arXiv:1710.04753), whose layers read ahead."""

    heavy_ball = "heavy_ball"
    adam = "adam"
    robust = "robust"


@dataclass(frozen=True)
class MomentumConfig:
    """Numbers that ``kind`` does not read keep their defaults."""

    kind: MomentumKind = MomentumKind.heavy_ball
    mu: float = field(default=0.7, metadata=within(0, 1, open_high=True))  # heavy_ball, adam: what p keeps
    step: float = field(default=1.0, metadata=above(0))  # heavy_ball, adam: multiplies p
    # adam: MoE layers that it computes; those after them go by heavy_ball
    adam_layers: int = field(default=1, metadata=at_least(1))
    adam_step: float = field(default=1.0, metadata=above(0))
    beta1: float = field(default=0.9, metadata=within(0, 1, open_high=True))
    beta2: float = field(default=0.999, metadata=within(0, 1, open_high=True))
    # adam: the part of the stream that is taken away; 1 leaves no residual, as in the released code
    decay: float = field(default=0.0, metadata=within(0, 1))
    # robust: the rate of convergence, the condition number and the largest curvature that it is made for
    rate: float = field(default=0.7, metadata=within(0, 1, open_low=True, open_high=True))
    condition: float = field(default=4.0, metadata=above(1))
    curvature: float = field(default=1.0, metadata=above(0))
