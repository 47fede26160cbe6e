"""The ``balance`` section of the typed configuration: losses on the experts' load, and controllers."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional


class LossName(Enum):
    """The published normalisations of the balance loss, told apart by name (value at perfect balance).

    ``switch`` (1): E sum_e f_e P_e, f the share of all assignments. ``gshard_first`` (1): f counts first
    choices only. ``sum_over_k`` (k): f counts assignments per token. ``l1`` (k times a token's scores):
    sum_over_k with scores as they are. ``importance``, ``load`` (0): squared variation of the weights' sums,
    of the choices. ``entropy``, ``mi`` (-log E): of the mean scores; minus the mean entropy. ``locality``,
    ``chunk_sparsity`` (-): how much neighbours' experts differ; share of experts that a run of tokens uses.
    ``dirichlet`` (0): distance from a prior on the scores. ``z`` (-): mean squared logsumexp.
    ``penalty`` (-): what a router charges for its own parameters.
    """

    switch = "switch"
    gshard_first = "gshard_first"
    sum_over_k = "sum_over_k"
    l1 = "l1"
    importance = "importance"
    load = "load"
    entropy = "entropy"
    mi = "mi"
    locality = "locality"
    chunk_sparsity = "chunk_sparsity"
    dirichlet = "dirichlet"
    z = "z"
    penalty = "penalty"


class LossScope(Enum):
    """Over which tokens f and P are taken; see ``moetrain/moe/balance/losses.py``."""

    micro = "micro"
    sequence = "sequence"
    global_batch = "global_batch"
    running = "running"


@dataclass(frozen=True)
class LossConfig:
    name: LossName = LossName.switch
    coef: float = 0.01
    scope: LossScope = LossScope.global_batch  # z, locality, chunk_sparsity have none: alike at every scope
    final_coef: Optional[float] = None  # the coefficient goes there linearly until step final_step
    final_step: int = 0
    steepness: Optional[float] = None  # locality only: of the sigmoid that stands for "active"; null: 100
    chunk_length: Optional[int] = None  # chunk_sparsity only: in tokens; null: 64
    alpha: Optional[float] = None  # dirichlet only: each expert's concentration in the prior; null: 1


@dataclass(frozen=True)
class BalanceConfig:
    losses: list[LossConfig] = field(default_factory=list)
    bias_rate: float = 0.0  # step of the aux-loss-free bias; 0: no controller
    sparsity_rate: float = 0.0  # ReMoE: the factor by which the coefficient of l1 moves; 0: no controller
    chunk_max_factor: float = 0.0  # BlockFFN: how far chunk_sparsity's coefficient may grow; 0: no controller
