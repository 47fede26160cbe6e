"""What every router must hold, as checks that run on any registered class: the seam's promises, tried out.

Shapes: T = B S tokens, D model, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetrain.moe import Router, RouterContext, Routing, build_router

_D = 6
_EXPERTS = (1, 2, 3, 7, 8, 13)
_SHAPES = ((1, 1), (2, 0), (0, 4), (2, 5), (3, 17), (1, 67))


@dataclass(frozen=True)
class Outcome:
    """One check's name and what it found; None where it holds."""

    name: str
    failure: str | None


class _BrokenError(Exception):
    """A promise that does not hold, in words."""


def check_router(name: str) -> list[Outcome]:
    """Run every check on the registered router ``name``; an exception of its own is a failure too."""
    outcomes = []
    for check in CHECKS:
        failure = None
        try:
            check(name)
        except _BrokenError as broken:
            failure = str(broken)
        except Exception as error:  # whatever a user's class raises is what the table shows
            failure = f"{type(error).__name__}: {error}"
        outcomes.append(Outcome((check.__doc__ or check.__name__).splitlines()[0], failure))
    return outcomes


def _build(name: str, num_experts: int, training: bool = True) -> Router:
    torch.manual_seed(num_experts)
    router = build_router(name, d_model=_D, num_experts=num_experts).double().train(training)
    with torch.no_grad():
        for parameter in router.parameters():
            if not parameter.any():  # a start at zero would hide what the parameter does
                parameter.normal_()
    return router


def _context(batch: int, seq: int, padded: bool) -> RouterContext:
    draw = torch.Generator().manual_seed(31 * batch + seq)
    tokens = batch * seq
    valid_T = torch.rand(tokens, generator=draw) < 0.6 if padded else None
    ids_T = torch.randint(0, 1000, (tokens,), generator=draw)
    return RouterContext(batch, seq, torch.arange(batch) + 5, ids_T, valid_T, seed=1, step=2, layer=3)


def _input(ctx: RouterContext, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(ctx.batch * ctx.seq, _D, generator=draw, dtype=torch.float64)


def _cases() -> Iterator[tuple[int, RouterContext, bool, str]]:
    for num_experts, (batch, seq), padded, training in itertools.product(
        _EXPERTS, _SHAPES, (False, True), (False, True)
    ):
        kind = ", padded" * padded + ", in evaluation" * (not training)
        where = f"E={num_experts}, {batch} x {seq} tokens{kind}"
        yield num_experts, _context(batch, seq, padded), training, where


def builds(name: str) -> None:
    """builds without options for any number of experts, and routes what it is given"""
    for num_experts, ctx, training, where in _cases():
        router = _build(name, num_experts, training)
        for x_TD in (_input(ctx), 0 * _input(ctx), 1e4 * _input(ctx)):
            try:
                router(x_TD, ctx)
            except Exception as error:
                raise _BrokenError(f"{where}: {type(error).__name__}: {error}") from error


def keeps_invariants(name: str) -> None:
    """its Routings are sorted by (expert, token), count right, and leave padding alone"""
    for num_experts, ctx, training, where in _cases():
        for x_TD in (_input(ctx), 0 * _input(ctx)):
            try:
                _build(name, num_experts, training)(x_TD, ctx).check()
            except ValueError as error:
                raise _BrokenError(f"{where}: {error}") from error


def ignores_padding(name: str) -> None:
    """what stands in the padding changes neither a choice nor a weight"""
    ctx = _context(3, 17, padded=True)
    assert ctx.valid_T is not None
    router = _build(name, 7)
    one = router(_input(ctx), ctx)
    other = router(_input(ctx).where(ctx.valid_T[:, None], _input(ctx, seed=9)), ctx)
    _same(one, other, "with other padding")


def follows_the_sequence(name: str) -> None:
    """a sequence is routed alike alone and in a batch (options as they are: groups of one sequence)"""
    ctx = _context(3, 17, padded=True)
    assert ctx.valid_T is not None
    assert ctx.token_ids_T is not None
    router, x_TD = _build(name, 7), _input(ctx)
    whole = router(x_TD, ctx).assignment
    for b in range(3):
        rows = slice(17 * b, 17 * b + 17)
        alone_ctx = replace(
            ctx, batch=1, sample_ids_B=ctx.sample_ids_B[b : b + 1], token_ids_T=ctx.token_ids_T[rows],
            valid_T=ctx.valid_T[rows],
        )  # fmt: skip
        mine = whole.token_ids_N // 17 == b
        alone = router(x_TD[rows], alone_ctx).assignment
        pairs = torch.stack([whole.expert_ids_N()[mine], whole.token_ids_N[mine] - 17 * b])
        if not torch.equal(pairs, torch.stack([alone.expert_ids_N(), alone.token_ids_N])):
            raise _BrokenError("other experts: is there noise that is not from ctx.uniform, or a coupling?")
        if not torch.allclose(whole.weights_N[mine], alone.weights_N, rtol=0, atol=1e-12):
            raise _BrokenError("the same experts, but other weights")


def repeats_itself(name: str) -> None:
    """the same call gives the same Routing, as recomputed activations need"""
    ctx = _context(3, 17, padded=False)
    router = _build(name, 7)
    _same(
        router(_input(ctx), ctx), router(_input(ctx), ctx), "the second time; draw noise by ctx.uniform only"
    )


def changes_no_state(name: str) -> None:
    """a call changes no parameter and no buffer; state moves in after_step alone"""
    for training in (False, True):
        ctx = _context(3, 17, padded=False)
        router = _build(name, 7, training)
        before = {key: value.clone() for key, value in router.state_dict().items()}
        router(_input(ctx), ctx)
        changed = [key for key, value in router.state_dict().items() if not torch.equal(value, before[key])]
        if changed:
            raise _BrokenError(f"{', '.join(changed)} changed in {'training' if training else 'evaluation'}")


def gradients_are_finite(name: str) -> None:
    """gradients of its weights are finite, also for tokens of zeros"""
    for num_experts, ctx, training, where in _cases():
        router = _build(name, num_experts, training)
        for x_TD in (_input(ctx), 0 * _input(ctx)):
            routing = router(x_TD.requires_grad_(), ctx)
            if not routing.assignment.weights_N.requires_grad:
                continue
            router.zero_grad()
            routing.assignment.weights_N.square().sum().backward()
            bad = [
                k for k, p in router.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
            ]
            if bad:
                raise _BrokenError(f"{where}: the gradient of {', '.join(bad)} is not finite")


def follows_the_step(name: str) -> None:
    """after_step takes what its Routings carry, and its buffers stay finite and keep their dtype"""
    ctx = _context(3, 17, padded=True)
    router = _build(name, 7)
    routing = router(_input(ctx), ctx)
    dtypes = {key: value.dtype for key, value in router.state_dict().items()}
    if routing.stats is not None:
        router.after_step(routing.stats)
    for key, value in router.state_dict().items():
        if value.dtype != dtypes[key] or not value.isfinite().all():
            raise _BrokenError(
                f"{key} is {value.dtype}, {'finite' if value.isfinite().all() else 'not finite'}"
            )


def says_what_it_is(name: str) -> None:
    """what its class says of it holds: scores, logits, penalty, choices, the bias, a token's experts"""
    ctx = _context(3, 17, padded=False)
    for training in (False, True):
        router = _build(name, 7, training)
        routing = router(_input(ctx), ctx)
        for field, said, value in (
            ("scores", router.has_scores, routing.scores_TE),
            ("logits", router.has_logits, routing.logits_TE),
            ("penalty", router.has_penalty, routing.penalty),
            ("choices", router.has_choices, routing.choices_TE),
        ):
            if said is not (value is not None):
                raise _BrokenError(f"has_{field}={said}, but its Routing has {'none' if said else 'some'}")
        tokens_N = routing.assignment.token_ids_N
        most = int(torch.bincount(tokens_N, minlength=1).max()) if len(tokens_N) else 0
        if router.top_k is not None and most > router.top_k:
            raise _BrokenError(f"top_k={router.top_k}, but a token takes {most} experts")
    if router.reads_bias is not (moved := _bias_moves_it(router, ctx)):
        what = "moves" if moved else "moves no"
        raise _BrokenError(f"reads_bias={router.reads_bias}, but bias_E {what} choices")
    if router.takes_best:
        _takes_the_best(_build(name, 7), ctx)


@torch.no_grad()
def obeys_a_record(name: str) -> None:
    """where it says that it replays: its own experts forced change no bit, and others are taken as given"""
    if not _build(name, 7).replays:
        return
    for padded, training in itertools.product((False, True), repeat=2):
        ctx, router = _context(3, 17, padded), _build(name, 7, training)
        own = router.route(_input(ctx), ctx)  # before any capacity
        a = own.assignment
        if router.top_k is None or a.choice_N is None:
            raise _BrokenError("replays=True needs a top_k, and a Routing of token choices")
        ids_TK = torch.arange(router.top_k).repeat(ctx.batch * ctx.seq, 1)
        ids_TK[a.token_ids_N, a.choice_N] = a.expert_ids_N()
        _same(own, router.route(_input(ctx), replace(ctx, forced={ctx.layer: ids_TK})), "with them forced")
        other_TK = (ids_TK + 1) % router.num_experts
        forced = router.route(_input(ctx), replace(ctx, forced={ctx.layer: other_TK}))
        valid_T1 = torch.ones(len(ids_TK), 1) if ctx.valid_T is None else ctx.valid_T[:, None]
        wanted_TE = torch.zeros(len(ids_TK), router.num_experts).scatter_(1, other_TK, 1.0) * valid_T1
        if not torch.equal(forced.demand_E, wanted_TE.sum(0).long()):
            raise _BrokenError("replays=True, but it takes other experts than those of ctx.forced_TK")


@torch.no_grad()
def _bias_moves_it(router: Router, ctx: RouterContext) -> bool:
    """Whether any bias that puts one expert first changes a choice."""
    before = router(_input(ctx), ctx)
    for expert in range(router.num_experts):
        router.bias_E.zero_()[expert] = 10.0
        after = router(_input(ctx), ctx)
        if not torch.equal(before.demand_BE, after.demand_BE):
            return True
    return False


@torch.no_grad()
def _takes_the_best(router: Router, ctx: RouterContext) -> None:
    """Raise unless every token takes the top_k best of its scores plus a bias that reorders them."""
    router.bias_E.copy_(torch.linspace(-0.5, 0.5, router.num_experts).roll(3))
    routing = router.route(_input(ctx), ctx)  # before any capacity
    scores_TE = routing.scores_TE
    if scores_TE is None or router.top_k is None or not ((scores_TE >= 0) & (scores_TE <= 1)).all():
        raise _BrokenError("takes_best=True needs a top_k and scores that lie in [0, 1]")
    taken_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
    taken_TE[routing.assignment.token_ids_N, routing.assignment.expert_ids_N()] = True
    biased_TE = scores_TE + router.bias_E
    least_T1 = biased_TE.topk(router.top_k, dim=-1).values[:, -1:]
    if not torch.equal(taken_TE, biased_TE >= least_T1):
        raise _BrokenError("takes_best=True, but a token takes others than the best of scores plus bias_E")


def _same(one: Routing, other: Routing, when: str) -> None:
    for field in ("token_ids_N", "weights_N", "counts_E"):
        if not torch.equal(getattr(one.assignment, field), getattr(other.assignment, field)):
            raise _BrokenError(f"{field} differs {when}")
    for field in ("demand_BE", "num_tokens_B"):
        if not torch.equal(getattr(one, field), getattr(other, field)):
            raise _BrokenError(f"{field} differs {when}")


CHECKS: tuple[Callable[[str], None], ...] = (
    builds, keeps_invariants, ignores_padding, follows_the_sequence, repeats_itself, changes_no_state,
    gradients_are_finite, follows_the_step, says_what_it_is, obeys_a_record,
)  # fmt: skip
