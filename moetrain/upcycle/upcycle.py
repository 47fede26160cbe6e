"""Sparse upcycling: a dense model's tensors in, an MoE model's out.

A pure function of full tensors on the CPU. Each layer draws from generators of its own, so that neither the
order of layers nor the number of ranks changes a bit. Names are those of ``models.decoder.Decoder``.

Shapes: E experts, D model, F hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.errors import UserError
from moetrain.models.count import abstract_decoder
from moetrain.moe.options import RouterConfig
from moetrain.ops.low_rank import starts_at_zero
from moetrain.upcycle.calibration import LayerCalibration
from moetrain.upcycle.draw import generator, normal
from moetrain.upcycle.ledger import Ledger, open_ledger
from moetrain.upcycle.method import METHODS, Job, Method, Promise, build_method
from moetrain.upcycle.methods import JoinOptions, Rest
from moetrain.upcycle.names import (
    OPTIM,
    SHARED,
    SHARED_GATE,
    dense_names,
    prefix,
    router_rows,
)
from moetrain.upcycle.networks import Networks
from moetrain.upcycle.optimizer_state import from_zero, layer_moments
from moetrain.upcycle.options import MethodOptions
from moetrain.upcycle.plan import Plan, take_shared
from moetrain.upcycle.router_start import check_start, own_start, start_router
from moetrain.upcycle.source import Source, State, check_donors
from moetrain.upcycle.target import Target

Calibration = Mapping[int, LayerCalibration]


@dataclass(frozen=True)
class Upcycled:
    """The MoE model's tensors, and what became of the source.

    dropped    source tensors that are in none of them.
    preserves  whether the result computes what the source does, with this router; ``reason`` says why.
    """

    state: dict[str, Tensor]
    dropped: list[str]
    notes: list[str]
    preserves: bool
    reason: str


@dataclass(frozen=True)
class Upcycling:
    """An upcycling that was checked and not yet done: :meth:`tensors` goes layer by layer."""

    job: Job
    method: Method[MethodOptions]
    source: Source
    ledger: Ledger
    shapes: Mapping[str, torch.Size]
    parameters: frozenset[str]
    calibration: Calibration

    @property
    def promise(self) -> Promise:
        """Whether the result computes what the source does, and why."""
        return self.method.promise(self.job)

    @property
    def notes(self) -> list[str]:
        return self.method.notes(self.job)

    @property
    def reads_text(self) -> bool:
        """Whether ``calibration`` must say what the source does on some text."""
        return self.method.reads_text(self.job)

    @property
    def reads_gradients(self) -> bool:
        """Whether it must say what that text's loss owes to each unit, too."""
        return self.method.reads_gradients(self.job)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor of the MoE model once. Those that pass unchanged are the source's own, not copies.

        Raises UserError for a shape that does not fit; those before it have come by then.
        """
        for name in self.ledger.passed:
            yield name, self.passed(name)
        for layer in range(self.job.target.model.num_layers):
            yield from self.low_rank(layer)
        for layer in self.job.target.layers:
            for name, tensor in self.layer(layer):
                yield name, self._fitting(name, tensor)

    def passed(self, name: str) -> Tensor:
        """A tensor that goes over as it is, or as the donors' mean."""
        options = self.method.options
        mean = isinstance(options, JoinOptions) and options.rest is Rest.mean
        return self._fitting(name, self.source.mean(name) if mean else self.source.states[0][name])

    def low_rank(self, layer: int) -> list[tuple[str, Tensor]]:
        """The block's low-rank factors by name: products of zero, as they are drawn; with their optimizer
        state, if it is carried, which starts from zero."""
        start = f"blocks.{layer}."
        names = sorted(name for name in self.ledger.fresh if name.startswith(start))
        if not names:
            return []
        donor, made = self.source.states[0], {}
        like = next(name for name in donor if name.startswith(f"{start}attention.w_"))
        dtype = donor[like].dtype
        for name in names:
            shape = self.shapes[name]
            drawn = normal(shape, generator(self.job.seed, layer, name), dtype) * (3 * shape[1]) ** -0.5
            made[name] = torch.zeros_like(drawn) if starts_at_zero(name) else drawn
        named = [(name, tensor.to(dtype)) for name, tensor in made.items()]
        if not self.method.options.carry_optimizer:
            return named
        shapes = {name: self.shapes[name] for name in names}
        return [*named, *from_zero(self.source, shapes, like)]

    @torch.no_grad()
    def layer(self, layer: int) -> list[tuple[str, Tensor]]:
        """The tensors of one new MoE layer by name, optimizer state included if it is carried."""
        networks = self.source.networks(layer)
        if networks.d_ff != self.job.d_ff:
            raise UserError(
                f"layer {layer} of the source has d_ff={networks.d_ff}, an earlier {self.job.d_ff}"
            )
        calibration = self.calibration.get(layer)
        plan = self.method.plan(self.job, layer, calibration)
        new = upcycle_layer(networks, self.method, plan, self.job, layer)
        new |= self._router(plan, networks, layer, calibration)
        named = [(prefix(layer) + name, tensor) for name, tensor in new.items()]
        if not self.method.options.carry_optimizer:
            return named
        fresh = {
            name: tensor.shape
            for name, tensor in named
            if name in self.parameters and (".router." in name or name.endswith(SHARED_GATE))
        }
        if self.method.keeps_dense:
            experts = {prefix(layer) + name: new[name].shape for name in self.method.made}
            dense = prefix(layer) + self.source.names[-1]
            return [*named, *from_zero(self.source, fresh), *from_zero(self.source, experts, dense)]
        return named + list(layer_moments(self.source, plan, layer, fresh))

    def _router(
        self, plan: Plan, networks: Networks, layer: int, calibration: LayerCalibration | None
    ) -> dict[str, Tensor]:
        if self.method.reads_moe:
            return self._copied_router(plan, networks, layer)
        dtype, options, job = networks.w_down_SFD.dtype, self.method.options, self.job
        start = start_router(options, job.target, plan, dtype, job.seed, layer, calibration)
        return {f"router.{name}": tensor for name, tensor in start.items()}

    def _copied_router(self, plan: Plan, networks: Networks, layer: int) -> dict[str, Tensor]:
        state, start = self.source.states[0], prefix(layer)
        own = own_start(self.job.target, networks.w_down_SFD.dtype, self.job.seed, layer)
        made = {}
        for name in router_rows(state, layer):
            made[name] = plan.rows(state[start + name], own.get(name.removeprefix("router.")))
        made["router.bias_E"] = made["router.bias_E"] * plan.bias_scale
        return made

    def _fitting(self, name: str, tensor: Tensor) -> Tensor:
        wanted = self.shapes.get(name)
        if wanted is not None and tensor.shape != wanted:
            raise UserError(f"{name} is {list(tensor.shape)} here, but the target model wants {list(wanted)}")
        return tensor


def upcycle_layer(
    networks: Networks, method: Method[MethodOptions], plan: Plan, job: Job, layer: int
) -> dict[str, Tensor]:
    """The experts of one layer, and its shared one if the plan has it, by name within the layer."""
    made: dict[str, Tensor] = {}
    if method.made:
        experts = method.experts(networks, plan, job, layer)
        made = dict(zip(method.made, (experts.w_gate_up_SDCF, experts.w_down_SFD), strict=True))
    if (shared := take_shared(networks, plan)) is not None:
        made |= zip(dense_names(job.target.gated, SHARED), shared.tensors, strict=True)
        if job.target.model.shared_gate:
            made[SHARED_GATE] = shared.w_down_DF.new_zeros(1, job.target.model.d_model)
    return made


def prepare(
    state: State,
    target: Target,
    options: MethodOptions,
    seed: int,
    calibration: Calibration | None = None,
    donors: Sequence[State] = (),
    source_router: RouterConfig | None = None,
) -> Upcycling:
    """Check everything that names and numbers tell. ``state`` may load its tensors as they are asked for.

    ``donors``: further models of the same shape, for ``JoinOptions``. ``source_router``: what an MoE source
    was trained with; None: nothing is promised. Raises UserError.
    """
    method = build_method(options)
    if donors and not method.takes_donors:
        raise UserError(f"method={options.name} reads one model, not {len(donors) + 1}")
    kind, asked = method.makes, target.experts.kind
    if asked is not kind:
        others = [name for name, spec in METHODS.items() if spec.cls.makes is asked]
        raise UserError(
            f"method={options.name} makes experts.kind={kind.name}, not {asked.name}: "
            f"set experts.kind={kind.name}, or take method={' or '.join(others)}"
        )
    states = [state, *donors]
    check_donors(states, options.carry_optimizer)
    if "embed_VD" not in state:
        raise UserError("the source has no tensor embed_VD: it is not a decoder's state")
    cfg = target.model
    try:
        model = abstract_decoder(cfg, target.router, target.experts, state["embed_VD"].shape[0])
    except ValueError as error:
        raise UserError(f"the target model cannot be built: {error}") from error
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    ledger = open_ledger(list(state), list(shapes), target, method)
    source = Source(states, method.reads_moe, target.gated)
    first = source.networks(target.layers[0])
    job = Job(target, seed, first.d_ff, first.count, source_router)
    method.check(job)
    if not method.reads_moe:
        check_start(options, target)
    parameters = frozenset(name for name, _ in model.named_parameters())
    return Upcycling(job, method, source, ledger, shapes, parameters, calibration or {})


def upcycle(
    state: State,
    target: Target,
    options: MethodOptions,
    seed: int,
    calibration: Calibration | None = None,
    donors: Sequence[State] = (),
    source_router: RouterConfig | None = None,
) -> Upcycled:
    """The whole MoE model at once; see :func:`prepare`, which takes the same and goes by layers."""
    work = prepare(state, target, options, seed, calibration, donors, source_router)
    made: dict[str, Tensor] = {}
    for name, tensor in work.tensors():
        if name in made:
            raise UserError(f"{name} was made twice")
        made[name] = tensor
    if missing := sorted(work.shapes.keys() - made.keys()):
        raise UserError(f"{missing[0]} was not made, nor {len(missing) - 1} others")
    promise, notes = work.promise, work.notes
    if options.carry_optimizer and not work.method.reads_moe:
        state_names = sum(name.startswith(OPTIM) for name in made)
        notes = [*notes, f"{state_names} tensors of optimizer state; routers start from zero"]
    return Upcycled(made, work.ledger.dropped, notes, promise.preserves, promise.reason)
