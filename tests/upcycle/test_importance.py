"""What hidden units matter to which experts: the gradients that the calibration reads, and the dealing.

Shapes: B batch, S sequence, T tokens, D model, F hidden units, E experts, N units.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import VOCAB
from torch import Tensor, nn
from upcycle_cases import SEED, build, config, dense_matrices, dense_state, gate_up_down, inputs, target

from moetrain.convert.calibrate import calibrate
from moetrain.moe.routers.topk import TopKOptions
from moetrain.upcycle import LayerCalibration, RouterStart, SplitBy, SplitOptions, upcycle
from moetrain.upcycle.importance import deal_by_importance, importance, most_wanted

SEQ = 11


class Text:
    """Four rows of random tokens; every third label is none."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(6)
        self.ids = torch.randint(VOCAB, (4, SEQ + 1), generator=generator)
        self.labels = torch.where(torch.arange(SEQ) % 3 == 1, -100, self.ids[:, 1:])

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Any, samples: Any) -> SimpleNamespace:
        ids_BS, labels_BS = self.ids[rows, :-1], self.labels[rows]
        return SimpleNamespace(input_ids_BS=ids_BS, labels_BS=labels_BS, doc_ids_BS=None, positions_BS=None)


class Masked(nn.Module):
    """SwiGLU whose hidden units are multiplied by ones that have a gradient."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.ones_BSF: Tensor | None = None

    def forward(self, x_BSD: Tensor, ctx: Any = None) -> tuple[Tensor, None]:
        layer: Any = self.layer
        h_BSF = F.silu(x_BSD @ layer.w_gate_FD.t()) * (x_BSD @ layer.w_up_FD.t())
        self.ones_BSF = torch.ones_like(h_BSF, requires_grad=True)
        return (h_BSF * self.ones_BSF) @ layer.w_down_DF.t(), None


@pytest.mark.parametrize("rows", [4, 2])
def test_saliency_is_the_gradient_of_a_mask(rows: int) -> None:
    torch.manual_seed(1)
    model, text = build(config(num_experts=0), TopKOptions()), Text()
    source, corpus = SimpleNamespace(build=lambda: model), SimpleNamespace(train=text)
    plain = calibrate(source, corpus, rows)  # type: ignore[arg-type]
    found = calibrate(source, corpus, rows, gradients=True)  # type: ignore[arg-type]
    assert all(not layer._forward_hooks for layer in model.modules())
    masks = [Masked(block.feed_forward) for block in model.blocks]  # type: ignore[arg-type]
    for block, mask in zip(model.blocks, masks, strict=True):
        block.feed_forward = mask
    ids_BS, labels_BS = text.ids[:: 4 // rows, :-1], text.labels[:: 4 // rows]
    logits_BSV = model.logits(model(ids_BS).hidden_BSD)
    F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="sum").backward()
    for layer, mask in enumerate(masks):
        assert mask.ones_BSF is not None
        assert mask.ones_BSF.grad is not None
        saliency_TF = found[layer].saliency_TF
        assert saliency_TF is not None
        expected_TF = mask.ones_BSF.grad.abs().flatten(0, 1)
        torch.testing.assert_close(saliency_TF, expected_TF, rtol=1e-11, atol=1e-14)
        assert plain[layer].saliency_TF is None
        torch.testing.assert_close(plain[layer].hidden_TF, found[layer].hidden_TF, rtol=0, atol=0)


def test_importance_is_a_mean_over_the_experts_own_tokens() -> None:
    generator = torch.Generator().manual_seed(8)
    saliency_TN = torch.rand(13, 7, generator=generator)
    inputs_TD = torch.randn(13, 3, generator=generator, dtype=torch.float64)
    towards_ED = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1e-9, -1e-9, 0]])  # the last is never the nearest
    inputs_TD[:, :2] = inputs_TD[:, :2].abs() + 0.1
    found_EN = importance(saliency_TN, inputs_TD, towards_ED)
    for n in range(7):
        of: list[list[float]] = [[], [], []]
        for t in range(13):
            near = [float((inputs_TD[t] * row.double()).sum()) for row in towards_ED]
            of[near.index(max(near))].append(float(saliency_TN[t, n]))
        assert not of[2]
        of[2] = saliency_TN[:, n].tolist()
        assert found_EN[:, n].tolist() == pytest.approx([sum(values) / len(values) for values in of])


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.integers(0, 99), st.booleans())
def test_dealing_takes_the_largest_importance_left(
    experts: int, width: int, shared: int, seed: int, ties: bool
) -> None:
    """By the loops of the paper's description: nothing is sorted, everything is looked at again each time."""
    generator = torch.Generator().manual_seed(seed)
    values_EN = torch.rand(experts, (experts + shared) * width, generator=generator, dtype=torch.float64)
    values_EN = (values_EN * 3).floor() if ties else values_EN
    table = values_EN.tolist()
    left = list(range(values_EN.shape[1]))
    common: list[int] = []
    while len(common) < shared * width:
        firsts = [sorted(left, key=lambda n, row=row: (-row[n], n))[:width] for row in table]  # type: ignore[misc]
        votes = {n: sum(n in first for first in firsts) for n in left}
        chosen = [n for n in left if votes[n] == max(votes.values())][: shared * width - len(common)]
        common += chosen
        left = [n for n in left if n not in chosen]
    assert most_wanted(values_EN, width, shared * width).tolist() == sorted(common)
    rest, expected = torch.tensor(left), [[] for _ in range(experts)]
    while left:
        room = [e for e in range(experts) if len(expected[e]) < width]
        n, e = min(((n, e) for n in left for e in room), key=lambda pair: (-table[pair[1]][pair[0]], *pair))
        expected[e].append(n)
        left.remove(n)
    assert deal_by_importance(values_EN, rest).tolist() == [sorted(units) for units in expected]


def test_experts_get_the_units_that_their_tokens_need() -> None:
    """Three kinds of tokens; the loss of each depends on units of its own, and of all on five more."""
    generator = torch.Generator().manual_seed(2)
    sizes = {"d_ff": 20, "d_ff_expert": 5, "num_experts": 3, "num_shared_experts": 1}
    kind_N = torch.randperm(20, generator=generator) // 5  # 3: of all
    kind_T = torch.arange(3).repeat(8)
    inputs_TD = inputs(23).flatten(0, 1)[:24] * 0.1 + torch.eye(23, dtype=torch.float64)[kind_T] * 5
    saliency_TN = (kind_N == kind_T[:, None]) * 1.0 + (kind_N == 3) * 2.0
    saliency_TN = saliency_TN + 0.1 * torch.rand(24, 20, generator=generator)
    seen = LayerCalibration(inputs_TD, torch.zeros(24, 20), saliency_TN)
    options = SplitOptions(by=SplitBy.gradients, router_start=RouterStart.centroids)
    state = dense_state(d_ff=20)
    result = upcycle(state, target(TopKOptions(top_k=1), **sizes), options, SEED, {0: seen, 1: seen}).state
    up_ND = dense_matrices(state, 0, 2)[1]
    rows_ED = result["blocks.0.feed_forward.router.weight_ED"]
    asked_E = (inputs_TD[:3] @ rows_ED.t()).argmax(1)  # the expert of each kind of token
    assert sorted(asked_E.tolist()) == [0, 1, 2]
    expert_EFD = gate_up_down(result, 0, 2)[1]
    for kind, expert in enumerate(asked_E.tolist()):
        units = (expert_EFD[expert][:, None] == up_ND).all(-1).long().argmax(-1)
        assert set(kind_N[units].tolist()) == {kind}
    shared_FD = result["blocks.0.feed_forward.shared.w_up_FD"]
    assert set(kind_N[(shared_FD[:, None] == up_ND).all(-1).long().argmax(-1)].tolist()) == {3}
