"""Dirichlet priors that are not symmetric, or a domain's own; losses that stop.

Shapes: T tokens, B sequences of S positions, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from invariance import B, E, assert_same, gradients, router_difference
from scipy import stats
from shaping_cases import draw, routing_of, softmax, value
from torch import Tensor

from moetrain.config.hydra.compose import compose_train
from moetrain.config.validate import validate
from moetrain.errors import UserError
from moetrain.moe import Routing
from moetrain.moe.balance import LossTerm, StepTotals, count_ahead, make_terms, total_loss
from moetrain.moe.balance.dirichlet import DirichletOptions
from moetrain.moe.balance.settings import LossConfig
from moetrain.train.log.jsonl import read_metrics

ALPHA = [0.4, 2.0, 1.1]
DOMAINS = [[3.0, 0.5, 0.7], [0.6, 0.9, 2.5]]
FREE = {"least_density": 0.0, "most_density": 1e30}


def term(scope: str = "sequence", **options: object) -> LossTerm:
    return LossTerm("dirichlet", 1.0, scope, options=DirichletOptions(**options))  # type: ignore[arg-type]


def routed(logits_TE: Tensor) -> Routing:
    """Two sequences of 16, whose ends are padding, and domains 0 to 3 in turn."""
    valid_T = torch.arange(32) % 16 < torch.tensor([16, 11]).repeat_interleave(16)
    routing = routing_of(logits_TE, 2, valid_T, softmax)
    return replace(routing, domain_ids_T=torch.arange(32) * 7 % 5 % 4)


def by_hand(p_TE: Tensor, routing: Routing, scope: str, priors: list[list[float]]) -> float:
    """Token by token; the last prior is of all domains beyond those of their own."""
    assert routing.valid_T is not None
    assert routing.domain_ids_T is not None
    total = 0.0
    for start, width in [(0, 32)] if scope == "micro" else [(0, 16), (16, 16)]:
        for d, alpha in enumerate(priors):
            own = [
                t
                for t in range(start, start + width)
                if routing.valid_T[t] and min(int(routing.domain_ids_T[t]), len(priors) - 1) == d
            ]
            for e, a in enumerate(alpha):
                column = sorted(float(p_TE[t, e]) for t in own)
                cdf = stats.beta(a, sum(alpha) - a).cdf(column)
                total += sum((i / (len(own) + 1) - x) ** 2 for i, x in enumerate(cdf, start=1)) / 3
    return total / int(routing.valid_T.sum())


@pytest.mark.parametrize("scope", ["sequence", "micro"])
@pytest.mark.parametrize("options", [{"alpha": ALPHA}, {"alpha": ALPHA, "by_domain": DOMAINS}])
def test_values_and_gradients_of_a_prior_an_expert(scope: str, options: dict[str, list[float]]) -> None:
    logits_TE = draw(32, 3, seed=5).requires_grad_()
    priors = [*options.get("by_domain", []), ALPHA]

    def loss(logits_TE: Tensor) -> Tensor:
        return value(term(scope, **options, **FREE), routed(logits_TE))

    expected = by_hand(logits_TE.detach().softmax(-1), routed(logits_TE), scope, priors)  # type: ignore[arg-type]
    assert float(loss(logits_TE).detach()) == pytest.approx(expected, rel=1e-10)
    assert torch.autograd.gradcheck(loss, logits_TE)


def test_draws_of_a_domains_prior_have_the_least_loss() -> None:
    draws = [torch.from_numpy(stats.dirichlet(alpha).rvs(499, random_state=0)) for alpha in DOMAINS]
    routing = routing_of(torch.cat(draws), score=torch.Tensor.clone)
    routing = replace(routing, domain_ids_T=torch.arange(2).repeat_interleave(499))
    right = float(value(term(by_domain=DOMAINS), routing))
    wrong = float(value(term(by_domain=DOMAINS[::-1]), routing))
    assert right < 5 / (6 * 499)
    assert min(wrong, float(value(term(alpha=ALPHA), routing))) > 20 * right


def test_a_list_of_one_number_is_the_symmetric_prior() -> None:
    routing = routed(draw(32, 3))
    assert float(value(term(alpha=[0.7] * 3), routing)) == float(value(term(alpha=0.7), routing))


def test_domains_that_are_not_known_are_said() -> None:
    with pytest.raises(ValueError, match=r"options\.by_domain needs the tokens' domains"):
        value(term(by_domain=DOMAINS), replace(routed(draw(32, 3)), domain_ids_T=None))


def test_no_gradient_depends_on_the_split_or_on_recompute() -> None:
    alpha = [0.5 + 0.3 * e for e in range(E)]
    terms = [term(by_domain=[alpha, alpha[::-1]])]
    whole = gradients(terms, B)
    assert router_difference(whole, gradients([term(alpha=alpha)], B)) > 1e-5
    for micro, recompute in ((B, True), (2, False), (1, True)):
        assert_same(whole, gradients(terms, micro, recompute))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("{alpha: [1, 2]}", "has 8 experts, but options.alpha lists 2"),
        ("{by_domain: [[1, 2, 3, 4, 5, 6, 7, 8], [1]]}", "has 8 experts, but options.by_domain lists 1"),
        ("{by_domain: [1, 2]}", "by_domain is a list of lists"),
        ("{alpha: none}", "alpha is a number or a list of numbers, not 'none'"),
        ("{alpha: [1, 0, 1, 1, 1, 1, 1, 1]}", "must be above 0"),
    ],
)
def test_priors_that_cannot_be(options: str, words: str) -> None:
    said = f"balance.losses=[{{name: dirichlet, scope: sequence, options: {options}}}]"
    with pytest.raises(UserError) as refused:
        validate(compose_train([said]))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_loss_stops() -> None:
    """Not computed, not counted ahead, not reported from its step on."""
    (stopping,) = make_terms([LossConfig("switch", stop_step=3)])
    records = [{0: routed(draw(32, 3))}]
    for step, terms_left in ((0, 1), (2, 1), (3, 0), (9, 0)):
        counts = count_ahead(records, [stopping], step)
        assert len(counts) == terms_left
        total, raw = total_loss(records[0], [stopping], StepTotals(27.0, counts, step=step))
        assert (total is not None) is bool(terms_left)
        assert len(raw) == terms_left


@pytest.mark.parametrize("micro", [4, 2])
def test_a_run_has_the_loss_in_its_warm_up_alone(
    corpus: Path, tmp_path: Path, micro: int, training: None
) -> None:
    losses = "balance.losses=[{name: switch, coef: 0.5, stop_step: 2}, {name: z, coef: 0.001}]"
    rows = {}
    for name, more in (("stops", [losses]), ("never", [losses.replace(", stop_step: 2", "")])):
        said = (*more, "balance.controllers={}", "train.steps=4", f"train.micro_batch_size={micro}")
        assert tiny.train(corpus, tmp_path / name, *said) == 0
        rows[name] = [row for row in read_metrics(tmp_path / name) if "train/loss" in row]
    key = "moe/0/aux/switch_global_batch"
    assert [key in row for row in rows["stops"]] == [True, True, False, False]
    assert all(key in row and "moe/0/aux/z" in row for row in rows["never"])
    losses_of = {name: [row["train/loss"] for row in found] for name, found in rows.items()}
    assert losses_of["stops"][:3] == losses_of["never"][:3]
    assert losses_of["stops"][3] != losses_of["never"][3]
