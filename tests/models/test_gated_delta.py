"""The attention ``gated_delta`` and gated attention: by hand, with documents, from a cache, counted.

Shapes: B batch, S sequence, D model, J key heads, N value heads, K and V their widths.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_cases import TINY, VOCAB, decoder, tokens
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moetrain.errors import UserError
from moetrain.models import Decoder, KVCache, cross_entropy_sum, generate
from moetrain.models.attention import Attention
from moetrain.models.attention_options import GatedDeltaConfig
from moetrain.models.count import count_parameters, flops_breakdown
from moetrain.models.gated_delta import GatedDelta
from moetrain.models.options import QKNorm
from moetrain.models.rope import rope_table
from moetrain.moe.options import ExpertsConfig
from moetrain.moe.routers.topk import TopKOptions
from moetrain.ops import delta_rule
from moetrain.ops.attention import Plan, SeenKeys
from moetrain.parallel.apply import parallelize
from moetrain.parallel.mesh import Meshes
from moetrain.train.optim.build import DECAY, MUON, NO_DECAY, group_parameters

DELTA = GatedDeltaConfig(num_key_heads=2, num_value_heads=6, key_head_dim=5, value_head_dim=7, conv_width=3)
HYBRID: dict[str, Any] = {"attention_pattern": ("gated_delta", "grouped_query"), "gated_delta": DELTA}
GATED: dict[str, Any] = {
    **HYBRID,
    "attention_gate": True,
    "zero_centered_norms": True,
    "qk_norm": QKNorm.head,
}
J, N, K, V = 2, 6, 5, 7


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones, so that short sequences have several."""
    rule = delta_rule.chunked_delta_rule
    monkeypatch.setattr("moetrain.models.gated_delta.chunked_delta_rule", lambda *a: rule(*a, chunk=4))


def fresh(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(replace(TINY, **changes), TopKOptions(), ExpertsConfig(), VOCAB)


def by_hand(layer: GatedDelta, x_SD: Tensor, docs: list[int]) -> Tensor:
    """One row, one token and head at a time; an id that comes again is another document."""
    w = {name: p.detach() for name, p in layer.named_parameters()}
    rows = torch.cat([x_SD @ w[f"w_{part}"].T for part in ("q_XD", "k_XD", "v_YD")], 1)
    taps, states, out = w["conv.weight_C1W"][:, 0], {}, []
    for t in range(len(docs)):
        own = [back for back in range(3) if t >= back and len(set(docs[t - back : t + 1])) == 1]
        mixed = F.silu(sum(rows[t - back] * taps[:, 2 - back] for back in own))
        q, k, v = mixed.split([J * K, J * K, N * V])
        heads = []
        for n in range(N):
            j = n // (N // J)
            q_K, k_K = (x[j * K : (j + 1) * K] for x in (q, k))
            q_K, k_K = (x / (x.square().sum() + 1e-6).sqrt() for x in (q_K, k_K))
            dt = x_SD[t] @ w["w_dt_ND"][n] + w["decay.b_dt_N"][n]
            state = states.get(n, torch.zeros(K, V).double())
            if t and docs[t] != docs[t - 1]:
                state = torch.zeros_like(state)
            state = state * torch.exp(-torch.exp(w["decay.a_log_N"][n]) * torch.log1p(torch.exp(dt)))
            beta = torch.sigmoid(x_SD[t] @ w["w_beta_ND"][n])
            states[n] = state + torch.outer(k_K, beta * (v[n * V : (n + 1) * V] - k_K @ state))
            y_V = q_K @ states[n] / K**0.5
            heads.append(y_V / (y_V.square().mean() + TINY.norm_eps).sqrt() * w["norm.weight_D"])
        out.append(w["w_out_DY"] @ (torch.cat(heads) * F.silu(x_SD[t] @ w["w_gate_YD"].T)))
    return torch.stack(out)


@pytest.mark.parametrize("packed", [False, True])
def test_the_layer_equals_its_equations(packed: bool) -> None:
    layer = decoder(**HYBRID).blocks[0].attention
    x_BSD = torch.randn(2, 11, TINY.d_model, dtype=torch.float64)
    docs = [[3] * 5 + [1] + [3] * 5, [0] * 9 + [2] * 2] if packed else [[0] * 11] * 2
    seen = SeenKeys(11, doc_ids_BS=torch.tensor(docs)) if packed else None
    found = layer(x_BSD, None, Plan("none", seen))
    expected = torch.stack([by_hand(layer, x, ids) for x, ids in zip(x_BSD, docs, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_gate_multiplies_what_attention_gives() -> None:
    gated, plain = (decoder(attention_gate=gate).blocks[0].attention for gate in (True, False))
    assert isinstance(gated, Attention)
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if k != "w_gate_QD"})
    plain.w_out_DQ.data = gated.w_out_DQ.data = torch.eye(60, dtype=torch.float64)
    x_BSD = torch.randn(2, 7, TINY.d_model, dtype=torch.float64)
    rope = rope_table(torch.arange(7)[None], 10, TINY.rope_theta, torch.float64, TINY.rope_scaling)
    plan = Plan("sdpa", None)
    expected = plain(x_BSD, rope, plan) * (x_BSD @ gated.w_gate_QD.T).sigmoid()
    torch.testing.assert_close(gated(x_BSD, rope, plan), expected, rtol=1e-12, atol=1e-12)


def test_norms_around_one_multiply_by_one_and_the_weight() -> None:
    """With weights less by one, the same function; they start at zero, but a head's norm of gated_delta."""
    plain, centred = decoder(qk_norm=QKNorm.head), decoder(qk_norm=QKNorm.head, zero_centered_norms=True)
    state = {k: v - 1 if "norm" in k else v for k, v in plain.state_dict().items()}
    centred.load_state_dict(state)
    ids = tokens(2, 7)
    torch.testing.assert_close(centred(ids).hidden_BSD, plain(ids).hidden_BSD, rtol=1e-10, atol=1e-10)
    start = {name: p for name, p in fresh(**GATED).named_parameters() if "norm" in name}
    assert len(start) == 1 + 3 * 2 + 2 + 2
    for name, p in start.items():
        assert (p == (1.0 if name.endswith("attention.norm.weight_D") else 0.0)).all(), name


@pytest.mark.parametrize("changes", [HYBRID, GATED, {**HYBRID, "attention_pattern": ("gated_delta",)}])
def test_packed_documents_equal_the_documents_apart(changes: dict[str, Any]) -> None:
    """Cut at different places, padding behind one of them; nothing of a neighbour comes through."""
    model, ids = decoder(**changes), tokens(2, 13)
    docs = torch.tensor([[0] * 4 + [1] * 9, [0] * 1 + [1] * 7 + [2] * 5])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((4, 9), (1, 7, 5))])
    packed = model(ids, doc_ids_BS=docs, positions_BS=positions).hidden_BSD
    for row, first, end in ((0, 0, 4), (0, 4, 13), (1, 0, 1), (1, 1, 8), (1, 8, 13)):
        alone = model(ids[row : row + 1, first:end]).hidden_BSD[0]
        torch.testing.assert_close(packed[row, first:end], alone, rtol=1e-10, atol=1e-10)
    assert (model(ids).hidden_BSD - packed).abs().max() > 1e-3


@pytest.mark.parametrize("pieces", [[1] * 11, [5, 1, 1, 4], [2, 9]])
def test_cached_pieces_equal_the_full_forward_pass(pieces: list[int]) -> None:
    """A first layer without keys counts the tokens too."""
    model, ids = decoder(**GATED), tokens(3, 11)
    cache = KVCache(3, 11)
    parts = [model(piece, cache=cache).hidden_BSD for piece in ids.split(pieces, dim=1)]
    assert cache.length == 11
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).hidden_BSD, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="holds 11 tokens; 12"):
        model(ids[:, :1], cache=cache)


def test_greedy_text_equals_the_uncached() -> None:
    model, ids = decoder(**GATED), tokens(1, 5)[0].tolist()
    text = list(ids)
    for _ in range(9):
        text.append(int(model.logits(model(torch.tensor([text])).hidden_BSD[0, -1]).argmax()))
    assert generate(model, ids, 9, temperature=0) == text[5:]


def loss_and_gradients(model: Decoder, ids_BS: Tensor, docs_BS: Tensor) -> list[Tensor]:
    hidden_BSD = model(ids_BS, doc_ids_BS=docs_BS).hidden_BSD
    total, count = cross_entropy_sum(hidden_BSD[:, :-1], model.head_weight, ids_BS[:, 1:])
    return [total.detach(), *torch.autograd.grad(total / count, list(model.parameters()))]


def test_recompute_changes_neither_loss_nor_gradients() -> None:
    model, ids = decoder(**GATED), tokens(2, 7)
    docs = (torch.arange(7) > 2).long().expand(2, 7)
    plain = loss_and_gradients(model, ids, docs)
    assert all(gradient.any() for gradient in plain[1:])
    for recompute in (False, True):  # what is cheap is computed again, and then all of it
        parallelize(model, Meshes(), recompute=recompute)
        again = loss_and_gradients(model, ids, docs)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def delta_layers(model: Decoder) -> list[str]:
    return [f"blocks.{i}." for i, a in enumerate(model.attentions()) if isinstance(a, GatedDelta)]


def test_which_layers_have_which_attention() -> None:
    pattern = ("gated_delta", "gated_delta", "grouped_query")
    model = decoder(num_layers=7, gated_delta=DELTA, attention_pattern=pattern)
    assert delta_layers(model) == [f"blocks.{i}." for i in (0, 1, 3, 4, 6)]
    assert delta_layers(decoder(attention="gated_delta", gated_delta=DELTA)) == [
        f"blocks.{i}." for i in range(3)
    ]


def test_small_parameters_neither_decay_nor_are_orthogonalised() -> None:
    model = decoder(**GATED)
    small = {".decay.a_log_N", ".decay.b_dt_N", ".conv.weight_C1W", ".norm.weight_D"}
    for muon in (False, True):
        groups = {kind: {name for name, _ in named} for kind, named in group_parameters(model, muon).items()}
        assert groups[NO_DECAY] >= {f"blocks.0.attention{name}" for name in small}
        matrices = groups[MUON] if muon else groups[DECAY]
        assert matrices >= {f"blocks.0.attention.w_{x}" for x in ("q_XD", "gate_YD", "beta_ND", "out_DY")}
        assert "blocks.1.attention.w_gate_QD" in matrices


def test_values_at_the_start() -> None:
    model = fresh(attention="gated_delta", gated_delta=GatedDeltaConfig(2, 512, 3, 2), num_layers=1)
    attention = model.blocks[0].attention
    a_N, dt_N = attention.decay.a_log_N.exp(), F.softplus(attention.decay.b_dt_N)
    assert a_N.min() > 0.009
    assert 14 < a_N.max() < 16.001
    assert abs(a_N.mean().item() - 8) < 0.7
    assert 0.0009 < dt_N.min() < 0.0012 < 0.08 < dt_N.max() < 0.105
    assert abs(attention.conv.weight_C1W.std().item() * 12**0.5 - 1) < 0.1


def test_operations_are_those_of_products_and_recurrence() -> None:
    """The counter sees products; a convolution's are three multiply-adds a channel, the rule's by hand."""
    seq, changes = 7, {**HYBRID, "num_layers": 2, "num_experts": 0}
    model, counter = decoder(torch.float32, **changes), FlopCounterMode(display=False)
    counts = count_parameters(model)
    assert counts.total == sum(p.numel() for p in model.parameters())
    matrices = [m for n, m in model.blocks[0].attention.named_parameters() if n.startswith("w_")]
    projections = sum(m.numel() for m in matrices) + 3 * (2 * J * K + N * V)
    cfg = model.cfg
    found = flops_breakdown(cfg, TopKOptions(), seq, VOCAB, causal=False)
    grouped = sum(p.numel() for n, p in model.blocks[1].attention.named_parameters() if p.ndim > 1)
    assert found.projections == 2 * (projections + grouped)
    assert found.scores == 2 * 3 * N * K * V + 4 * 6 * 10 * seq
    with counter, torch.no_grad():
        model.blocks[0].attention(torch.randn(1, 1, 23), None, Plan("none", None), KVCache(1, 1).layers[0])
    linear_alone = 2 * sum(m.numel() for m in matrices)
    assert counter.get_total_flops() == linear_alone + 2 * 3 * N * K * V


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention": "gated_delta", "attention_pattern": ("grouped_query",)}, "leave one of the two out"),
        ({"attention_pattern": ("grouped_query",) * 4}, "more than model.num_layers=3"),
        ({"gated_delta": GatedDeltaConfig(conv_width=3)}, "gated_delta.conv_width=3 is read by"),
        ({**HYBRID, "gated_delta": GatedDeltaConfig(4, 6)}, "num_key_heads=4 does not divide"),
        ({**HYBRID, "gated_delta": GatedDeltaConfig(0, 6)}, "num_key_heads=0 must be 1 or more"),
        ({"attention": "gated_delta", "attention_gate": True}, "model.attention_gate=True is read by"),
        ({"attention": "gated_delta", "rope_fraction": 0.4}, "rope_fraction=0.4 is read by"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        decoder(**changes)
    assert "\n" not in str(error.value)
