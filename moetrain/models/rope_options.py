"""The ``model.rope_scaling`` section of the typed configuration: positions beyond those first trained on."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from moetrain.bounds import above, at_least


class RopeKind(Enum):
    """``linear``: every frequency divided by the factor (Chen et al. 2023, arXiv:2306.15595).

    ``llama3``: low ones divided, high ones kept (Grattafiori et al. 2024, arXiv:2407.21783). ``yarn``: the
    same by parts, and larger attention scores (Peng et al. 2023, arXiv:2309.00071).
    """

    none = "none"
    linear = "linear"
    llama3 = "llama3"
    yarn = "yarn"


@dataclass(frozen=True)
class RopeScaling:
    """Numbers that ``kind`` does not read keep their defaults. A turn is a full rotation of a pair."""

    kind: RopeKind = RopeKind.none
    factor: float = field(default=1.0, metadata=at_least(1))  # how many times the original positions
    # llama3, yarn: the length trained on before scaling
    original_max_positions: Optional[int] = field(default=None, metadata=at_least(1, 2**31 - 1))
    # llama3: pairs of at most so many turns in the original length are divided
    low_freq_factor: float = field(default=1.0, metadata=above(0))
    high_freq_factor: float = 4.0  # llama3: pairs of at least so many are kept
    beta_fast: float = 32.0  # yarn: pairs of at least about so many turns are kept
    # yarn: pairs of at most about so many are divided
    beta_slow: float = field(default=1.0, metadata=above(0))
    truncate: bool = True  # yarn: the bounds of the two as whole pairs
    # yarn: of queries and keys; null: 0.1 ln(factor) + 1, or by the two mscales where both are given
    attention_factor: Optional[float] = field(default=None, metadata=above(0))
    # yarn: (0.1 mscale ln(factor) + 1) / (the same of mscale_all_dim)
    mscale: Optional[float] = field(default=None, metadata=above(0))
    # yarn: with model.attention=latent the scores times (0.1 mscale_all_dim ln(factor) + 1)^2 besides
    mscale_all_dim: Optional[float] = field(default=None, metadata=above(0))

    def grown(self, mscale: float = 1.0) -> float:
        """0.1 mscale ln(factor) + 1."""
        return 0.1 * mscale * math.log(self.factor) + 1
