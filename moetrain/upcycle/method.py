"""The seam of upcycling methods: a base class, and a registry by options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from moetrain.bounds import check_ranges
from moetrain.errors import UserError
from moetrain.moe.options import ExpertKind, RouterConfig
from moetrain.upcycle.calibration import LayerCalibration
from moetrain.upcycle.names import EXPERTS
from moetrain.upcycle.networks import Networks
from moetrain.upcycle.options import MethodOptions, RouterStart
from moetrain.upcycle.plan import Plan, take_experts
from moetrain.upcycle.target import Target

Options = TypeVar("Options", bound=MethodOptions)


@dataclass(frozen=True)
class Job:
    """What all layers share. ``d_ff``: width of the source's networks, ``sources`` of them in a layer."""

    target: Target
    seed: int
    d_ff: int
    sources: int = 1
    source_router: RouterConfig | None = None


@dataclass(frozen=True)
class Promise:
    """Whether the MoE model computes the dense function at step 0, and one sentence why or why not."""

    preserves: bool
    reason: str


class Method(Generic[Options]):
    """One way to make experts. Everything is a function of the job and the layer."""

    reads_moe = False  # whether the source's layers are MoE already
    fills_shared = False  # whether it makes the target's shared experts
    makes = ExpertKind.networks  # what experts are; of the other kinds the dense network stays as it is
    takes_donors = False  # whether it reads several models

    def __init__(self, options: Options) -> None:
        self.options = options

    def check(self, job: Job) -> None:
        """UserError where sizes or options do not fit; before any layer is read."""

    @property
    def keeps_dense(self) -> bool:
        """Whether the dense network stays as it is, beside what experts are."""
        return self.makes is not ExpertKind.networks

    @property
    def made(self) -> tuple[str, ...]:
        """The names within a layer of the experts that it makes."""
        return () if self.makes is ExpertKind.low_rank else EXPERTS

    def plan(self, job: Job, layer: int, calibration: LayerCalibration | None) -> Plan:
        raise NotImplementedError

    def experts(self, networks: Networks, plan: Plan, job: Job, layer: int) -> Networks:
        """The experts of one layer; not asked for where they are products (:meth:`made`)."""
        experts = take_experts(networks, plan)
        self.redraw(experts, plan, job, layer)
        return experts

    def redraw(self, experts: Networks, plan: Plan, job: Job, layer: int) -> None:
        """Draw, in place, what is new in freshly copied experts."""

    def promise(self, job: Job) -> Promise:
        raise NotImplementedError

    def reads_text(self, job: Job) -> bool:
        """Whether :meth:`plan` or the router's first rows need calibration."""
        return self.options.router_start is RouterStart.centroids

    def reads_gradients(self, job: Job) -> bool:
        """Whether :meth:`plan` needs the calibration's ``saliency_TF``."""
        return False

    def notes(self, job: Job) -> list[str]:
        """What a user may want to know of the result, a sentence each."""
        return []


@dataclass(frozen=True)
class MethodSpec:
    name: str
    cls: type[Method[MethodOptions]]
    options: type[MethodOptions]
    paper: str


METHODS: dict[str, MethodSpec] = {}
M = TypeVar("M", bound=type)


def register(name: str, options: type[MethodOptions], paper: str) -> Callable[[M], M]:
    """Class decorator: make a method known by name. A second use of a name is an error."""

    def add(cls: M) -> M:
        if name in METHODS and METHODS[name].cls is not cls:
            raise ValueError(f"upcycling method {name!r} is registered already")
        METHODS[name] = MethodSpec(name, cls, options, paper)
        return cls

    return add


def build_method(options: MethodOptions) -> Method[MethodOptions]:
    """The method of ``options.name``. UserError for an unknown name, and for another method's options or some
    out of their range."""
    spec = METHODS.get(options.name)
    if spec is None:
        raise UserError(f"method={options.name} is not known; known: {', '.join(sorted(METHODS))}")
    if not isinstance(options, spec.options):
        raise UserError(f"method={options.name} takes {spec.options.__name__}, not {type(options).__name__}")
    check_ranges(options, "method")
    return spec.cls(options)


def same_width(job: Job) -> None:
    """UserError unless an expert is as wide as a source network."""
    if job.target.model.d_ff_expert != job.d_ff:
        raise UserError(
            f"whole networks of d_ff={job.d_ff} do not fit model.d_ff_expert="
            f"{job.target.model.d_ff_expert}: set them equal, or take method=granular or split"
        )


def same_share(job: Job, of: str) -> int:
    """How many experts come from each source network; UserError where there is a rest. ``of`` names them."""
    same_width(job)
    num_experts = job.target.model.num_experts
    if num_experts % job.sources:
        raise UserError(f"model.num_experts={num_experts} must be a multiple of the {job.sources} {of}")
    return num_experts // job.sources


def identical_experts(job: Job) -> Promise:
    """What E copies of one network promise."""
    combine = job.target.combine
    lost = combine.keeps_the_total()
    if lost is None and combine.total != 1.0:
        lost = f"a token's weights sum to {combine.total:g}, not 1; set router.route_scale=1"
    if lost is not None:
        return Promise(False, f"the experts are equal, but {lost}")
    return Promise(True, "the experts are equal and every token's weights sum to 1")
