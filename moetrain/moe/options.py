"""Options of routers and experts: plain frozen dataclasses, so that moe/ needs no config library."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from moetrain.bounds import above, at_least, within
from moetrain.moe.combine import Combine
from moetrain.moe.evaluation import Words


class Activation(Enum):
    """Gated ones multiply the activated gate by the up projection, ``drelu`` by its positive part,
    ``swiglu_clamped`` by 1 plus what is clamped of it; plain ones have no gate. ``geglu_tanh``: GELU by its
    tanh formula."""

    swiglu = "swiglu"
    geglu = "geglu"
    reglu = "reglu"
    drelu = "drelu"
    swiglu_clamped = "swiglu_clamped"
    geglu_tanh = "geglu_tanh"
    gelu = "gelu"
    relu = "relu"
    relu2 = "relu2"
    silu = "silu"


class ExpertKind(Enum):
    """``networks``: each expert is a feed-forward network. ``adapters``: each is a bottleneck of width
    ``model.d_ff_expert`` on the output of one shared network of width ``model.d_ff``. ``low_rank``: each is
    one shared network of width ``model.d_ff_expert``, and low-rank products of its own (``model.lora``)
    beside the network's matrices."""

    networks = "networks"
    adapters = "adapters"
    low_rank = "low_rank"


class FirstWeights(Enum):
    """How experts' networks of width F begin, E of them. Dense layers and shared experts begin as the model.

    ``model``: as all else, by ``model.init_std``. ``one_network``: as parts of one network of width E F, so
    with variances 1 / D up and 1 / (E F) down (sigma-MoE). ``tenth``: a tenth of the variances of a network
    of their own, 0.1 / D up and 0.1 / F down (Switch).
    """

    model = "model"
    one_network = "one_network"
    tenth = "tenth"

    def stds(self, num_experts: int, d_model: int, d_ff: int) -> tuple[float, float]:
        """Standard deviations, up and down; of a layer without a model around it for ``model``."""
        if self is FirstWeights.one_network:
            return d_model**-0.5, float(num_experts * d_ff) ** -0.5
        scale = 0.1**0.5 if self is FirstWeights.tenth else 1.0
        return scale * d_model**-0.5, scale * d_ff**-0.5


class Backend(Enum):
    """``loop`` is the oracle; ``triton`` and ``triton_block_sparse`` are kernels of this package, ``torch``
    uses torch's grouped products, ``cpu`` works expert by expert in cache-sized tiles; ``megablocks`` and
    ``scattermoe`` are products of other packages; ``auto`` is the first of the device's ladder that fits and
    passes its self-test.
    """

    auto = "auto"
    loop = "loop"
    triton = "triton"
    torch = "torch"
    cpu = "cpu"
    triton_block_sparse = "triton_block_sparse"
    megablocks = "megablocks"
    scattermoe = "scattermoe"


class Keep(Enum):
    """What experts keep for the backward pass besides routing weights and indices.

    ``preactivation``: their input and what the up projection yields; ``inputs``: their input alone, and the
    backward pass computes the up projection again, to the same bits.
    """

    preactivation = "preactivation"
    inputs = "inputs"


class DropOrder(Enum):
    """Which assignments over capacity survive.

    ``position``: the first come; ``choice``: every first choice before any second (GShard); ``probability``:
    the heaviest; ``batch_prioritized``: those of the tokens with the highest score (V-MoE); ``random``.
    """

    position = "position"
    choice = "choice"
    probability = "probability"
    batch_prioritized = "batch_prioritized"
    random = "random"


class Repair(Enum):
    """The rule for assignments over capacity, or for the places that capacity leaves free (``repair.py``).

    ``none``: dropped; ``next_expert``: to the token's next best expert with room; ``local``: to the best
    expert of the token's own device, whatever its load; ``fill_in``: dropped, but free places go to the
    tokens that would choose the expert next; ``local_fill_in``: both.
    """

    none = "none"
    next_expert = "next_expert"
    local = "local"
    fill_in = "fill_in"
    local_fill_in = "local_fill_in"

    @property
    def is_local(self) -> bool:
        """Whether it asks which experts lie on a token's own device."""
        return self in (Repair.local, Repair.local_fill_in)

    @property
    def fills_in(self) -> bool:
        """Whether free places go to tokens that did not ask for them."""
        return self in (Repair.fill_in, Repair.local_fill_in)


class Rounding(Enum):
    """The multiple of ``router.rounding_tile`` that an expert's number of tokens becomes in training
    (``token_rounding.py``): ``none``: as it is; ``nearest``; ``up``; ``down``.
    """

    none = "none"
    nearest = "nearest"
    up = "up"
    down = "down"


@dataclass(frozen=True)
class ExpertsConfig:
    kind: ExpertKind = ExpertKind.networks
    activation: Activation = Activation.swiglu  # of every feed-forward network: dense layers', and the one
    # that adapters share; adapters' own is gelu
    backend: Backend = Backend.auto
    first_weights: FirstWeights = FirstWeights.model
    keep: Keep = Keep.preactivation
    # in training, of experts alone: the share of their hidden units that is dropped (Switch's fine-tuning)
    dropout: float = field(default=0.0, metadata=within(0, 1, open_high=True))
    # and of what each of them reads (PESC's adapters)
    input_dropout: float = field(default=0.0, metadata=within(0, 1, open_high=True))
    # the first so many experts of each layer stay as they are, as old ones beside new ones (growth)
    frozen: int = field(default=0, metadata=at_least(0))
    # rows; null: 32 on a CPU; on a GPU 16 to 128, the least that holds an expert's mean rows
    block: Optional[int] = field(default=None, metadata=at_least(1, 2**20))
    # more at once are computed in rounds; null: no bound
    max_rows_per_rank: Optional[int] = field(default=None, metadata=at_least(1))
    bias: bool = False  # of experts' projections, each expert its own (GPT-OSS)


@dataclass(frozen=True)
class RouterConfig:
    """The options that all routers share. ``name`` is the router's key in ROUTERS.

    ``group``: how many sequences form a routing group, the tokens that a capacity or a rounding couples:
    ``sequence`` (one), a number that divides the micro-batch, or ``all``: the step's, over all ranks.
    """

    name: str = "topk"
    group: str = "sequence"
    capacity_factor: Optional[float] = field(default=None, metadata=above(0))  # null: dropless
    # null: dropless in evaluation
    eval_capacity_factor: Optional[float] = field(default=None, metadata=above(0))
    min_capacity: int = field(default=4, metadata=at_least(0))
    drop_order: DropOrder = DropOrder.position
    repair: Repair = Repair.none  # needs a capacity factor, and a router with scores
    # of a local repair: the devices that share the experts; null: as many as parallel.ep
    local_devices: Optional[int] = field(default=None, metadata=at_least(2))
    # and how many consecutive sequences of the run are one device's; null: a rank's share of a step
    local_sequences: Optional[int] = field(default=None, metadata=at_least(1))
    # in training: no expert has more than 1 + this times the mean load of its group's tokens so far; null: no
    # bound; needs a router with scores, and no capacity factor
    max_overload: Optional[float] = field(default=None, metadata=at_least(0))
    rounding: Rounding = Rounding.none  # in training; needs a router with scores, and no capacity factor
    rounding_tile: int = field(default=128, metadata=at_least(1, 2**20))  # tokens
    # steps of a search for the best order of experts (``permutation.py``); null: no search
    permutation_steps: Optional[int] = field(default=None, metadata=at_least(1))
    # of the search, in the router's penalty: of its matrix's entropy
    permutation_entropy_coef: float = field(default=1e-4, metadata=at_least(0))

    def evaluation_rule(self, num_experts: int) -> Optional[Words]:
        """The router's rule in evaluation over E experts, as ``evaluation.py`` describes it, or None.

        It does not pass to a subclass, whose router may do otherwise (``RouterSpec.exported``).
        """
        return None

    def for_vocabulary(self, size: int) -> "RouterConfig":
        """The options in a model of ``size`` token ids, for routers with a table of them."""
        return self

    @property
    def drops(self) -> bool:
        """Whether a capacity, a rounding or a bound on load may take assignments away."""
        return self.limits or self.rounding is not Rounding.none or self.max_overload is not None

    @property
    def limits(self) -> bool:
        """Whether there is a capacity, in training or in evaluation."""
        return self.capacity_factor is not None or self.eval_capacity_factor is not None

    def combine(self, num_experts: int) -> Combine:
        """What is known of the combine weights over E experts; a router that says nothing: only ``drops``."""
        return Combine(drops=self.drops)

    def expert_groups(self) -> int:
        """A number that must divide the experts, because the router forms as many groups of them."""
        return 1
