"""A step is a function of its batch: micro-batches and recomputed activations change nothing of it.

In fp64, through the trainer's own step, to 1e-10: every gradient and every figure. Ranks are in tests/dist.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from invariance import (
    FORMS,
    B,
    Outcome,
    V,
    assert_same,
    batch,
    cut,
    gradients,
    router_difference,
    terms,
    weights_after_three_steps,
)

SPLITS = [(8, True), (4, False), (2, True), (1, False), (1, True)]  # (sequences a micro-batch, recompute)


@cache
def whole(form: str, scope: str) -> Outcome:
    """One micro-batch of everything, nothing recomputed."""
    return gradients(terms(form, scope), B)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", ["sequence", "global_batch", "running"])
def test_no_gradient_depends_on_the_split_or_on_recompute(scope, form):
    one = whole(form, scope)
    assert len(one.tensors) == 35
    assert one.figures["tokens"] == 48
    assert one.figures["moe/1/drop_rate"] > 0.02
    for micro, recompute in SPLITS:
        assert_same(one, gradients(terms(form, scope), micro, recompute))


@pytest.mark.parametrize("form", FORMS)
def test_micro_depends_on_the_micro_batch_and_on_nothing_else(form):
    by_size = {micro: gradients(terms(form, "micro"), micro) for micro in (1, 2, 4, 8)}
    for micro, one in by_size.items():
        assert_same(one, gradients(terms(form, "micro"), micro, recompute=True))
        for other in (by_size[size] for size in by_size if size < micro):
            assert router_difference(one, other) > 1e-4
    # of a single micro-batch, or of single sequences, it is one of the others
    assert_same(by_size[8], _renamed(whole(form, "global_batch"), form))
    assert router_difference(by_size[8], whole(form, "sequence")) > 1e-4


def _renamed(outcome: Outcome, form: str) -> Outcome:
    old, new = f"{form}_global_batch", f"{form}_micro"
    return Outcome(outcome.tensors, {key.replace(old, new): v for key, v in outcome.figures.items()})


def test_scopes_and_forms_are_different_losses():
    outcomes = [whole(form, scope) for form in FORMS for scope in ("sequence", "global_batch", "running")]
    # the running share has no form but the factor k
    apart = [(a, b) for i, a in enumerate(outcomes) for b in outcomes[:i] if router_difference(a, b) < 1e-4]
    assert len(apart) == 1


@pytest.mark.parametrize(("micro", "recompute"), SPLITS)
def test_clipped_updates_do_not_depend_on_the_split_either(micro, recompute):
    one, other = weights_after_three_steps(B), weights_after_three_steps(micro, recompute)
    assert_same(one, other)


@pytest.mark.parametrize("scope", ["sequence", "global_batch", "running", "micro"])
def test_padding_has_no_part_in_it(scope):
    """Other tokens in the padding: nothing of the step sees them, neither a loss nor a count."""
    one = batch()
    ids_BS = one.input_ids_BS.where(one.valid_BS, (one.input_ids_BS + 3) % V)
    assert not torch.equal(ids_BS, one.input_ids_BS)
    outcomes = [
        gradients(terms("switch", scope), 4, whole=b) for b in (one, replace(one, input_ids_BS=ids_BS))
    ]
    assert_same(*outcomes)


def test_documents_and_positions_reach_the_model():
    """Stretched positions, since RoPE is relative: a constant added to a document's changes nothing."""
    one = gradients(terms("switch", "sequence"), B)
    whole = batch()
    assert whole.positions_BS is not None
    for change in ({"doc_ids_BS": None}, {"positions_BS": 3 * whole.positions_BS}):
        other = gradients(terms("switch", "sequence"), B, whole=replace(whole, **change))
        assert abs(one.figures["loss"] - other.figures["loss"]) > 1e-5


def test_a_step_leaves_nothing_behind():
    """The same step again, with weights that did not change: the same gradients, and not their double."""
    losses = terms("switch", "global_batch")
    assert_same(whole("switch", "global_batch"), gradients(losses, 4, repeat=2))


def test_the_batch_has_what_is_hard():
    """A rank without a target, a sequence without a token, and uneven shares of both."""
    assert [sum(b.num_targets for b in cut(batch(), 2, rank, 4)) for rank in range(4)] == [12, 8, 4, 0]
    assert [b.num_targets for b in cut(batch(), 4, 1, 2)] == [4]
    assert sum(b.num_targets for b in cut(batch(), 1)) == 24
    assert not cut(batch(), 1)[5].valid_BS.any()
