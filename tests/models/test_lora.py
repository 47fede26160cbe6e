"""Low-rank products beside matrices that stay (LoRA): the function, its gradients, what is counted.

Shapes: B batch, S sequence, D model, N rows and K columns of a matrix, R rank, E experts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from lora_cases import ALL, drawn, factors, model, product, rank_of, summed
from model_cases import tokens
from torch import Tensor

from moetrain.errors import UserError
from moetrain.models.attention_options import GatedDeltaConfig
from moetrain.models.count import count_parameters
from moetrain.models.latent_options import LatentConfig
from moetrain.models.lora_options import LoraConfig
from moetrain.moe.options import Activation, Backend, ExpertKind, Keep
from moetrain.ops import linear
from moetrain.ops.cpu import per_expert
from moetrain.ops.low_rank import is_factor
from moetrain.train.optim.build import build_optimizer, freeze
from moetrain.train.optim.options import AdamWConfig

NONE = LoraConfig()
ADAPTERS = replace(ALL, targets=tuple(t for t in ALL.targets if "shared" not in t))
LATENT_ALL = replace(ALL, targets=("*.attention.w_q_*=4", *ALL.targets[1:]))
BUT_ROUTERS = replace(ALL, targets=tuple(t for t in ALL.targets if "router" not in t))
BIASED = {"bias": True, "activation": Activation.swiglu_clamped}
LATENT = LatentConfig(kv_lora_rank=13, qk_nope_head_dim=7, qk_rope_head_dim=6, v_head_dim=5)
OF_LATENT = {"attention": "latent", "num_kv_heads": None, "head_dim": None}
NARROW_QUERIES = replace(LATENT, q_lora_rank=17)
DELTA = GatedDeltaConfig(num_key_heads=2, num_value_heads=6, key_head_dim=5, value_head_dim=7, conv_width=3)
ALONE = ["*", "!*.lora_*"]  # of optim.frozen: products are trained alone


def out(decoder: Any, batch: int = 3, seq: int = 7) -> Tensor:
    logits: Tensor = decoder.logits(decoder(tokens(batch, seq)).hidden_BSD)
    return logits


@pytest.mark.parametrize(
    ("lora", "how"),
    [
        (ALL, {}),
        (ALL, {"backend": Backend.loop}),
        (ALL, {"experts": {"keep": Keep.inputs}}),
        (ADAPTERS, {"kind": ExpertKind.adapters}),
        (replace(ALL, targets=("*.experts.w_down_EFD",)), {}),
        (ALL, {"experts": BIASED}),
        (ALL, {"experts": {**BIASED, "keep": Keep.inputs}}),
        (ALL, {"experts": BIASED, "backend": Backend.loop}),
        (ALL, {"attention_gate": True, "out_bias": True, "attention_sinks": True}),
        (LATENT_ALL, {**OF_LATENT, "latent": NARROW_QUERIES}),
        (ALL, {**OF_LATENT, "latent": LATENT}),
        (ALL, {"attention_pattern": ("gated_delta", "grouped_query"), "gated_delta": DELTA}),
        (ALL, {"mlp_bias": True}),
        (BUT_ROUTERS, {"feed_forward": "avg_k"}),
        (BUT_ROUTERS, {"feed_forward": "moe_x", "experts": {"activation": Activation.relu}}),
        (ALL, {"feed_forward": "s2moe"}),
    ],
    ids=["cpu", "loop", "inputs kept", "adapters", "down alone", "biases", "biases, inputs kept",
         "biases, loop", "gate", "latent queries", "latent", "gated delta", "dense biases", "mean keys",
         "sparsity", "noisy copies"],
)  # fmt: skip
def test_output_and_gradients_are_those_of_the_sum(lora: LoraConfig, how: dict[str, Any]) -> None:
    ours, plain = drawn(model(lora, **how)), model(NONE, **how)
    plain.load_state_dict(summed(ours, lora))
    found, expected = out(ours), out(plain)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    for logits in (found, expected):
        logits.square().sum().backward()
    theirs, pairs = dict(plain.named_parameters()), factors(ours)
    matrices = {name for name, w in theirs.items() if w.ndim > 1 and ".experts.bias_" not in name}
    assert pairs.keys() == {name for name in matrices if lora.rank_of(name) is not None} != set()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours.get_parameter(name).grad, weight.grad, rtol=1e-9, atol=1e-9)
    for matrix, names in pairs.items():
        dw = theirs[matrix].grad
        leaves = [ours.get_parameter(name).detach().requires_grad_() for name in names]
        a, b = leaves
        factor = lora.alpha / rank_of(a)
        by_hand = b @ a if a.ndim == 2 else torch.einsum("ekr,er...->ek...", a, b)
        (by_hand * factor).backward(dw)
        for name, leaf in zip(names, leaves, strict=True):
            torch.testing.assert_close(ours.get_parameter(name).grad, leaf.grad, rtol=1e-9, atol=1e-9)


def test_torch_s_grouped_products_compute_the_same() -> None:
    lora = replace(ALL, targets=("*.experts.*=4",))
    widths = {"d_model": 24, "num_heads": 4, "num_kv_heads": 2, "d_ff_expert": 12}
    found = []
    for backend in (Backend.torch, Backend.loop):
        decoder = drawn(model(lora, backend, dtype=torch.float32, **widths))
        out(decoder).square().mean().backward()
        found.append([parameter.grad for parameter in decoder.parameters()])
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("backend", [Backend.auto, Backend.loop], ids=["auto", "loop"])
def test_a_model_starts_as_without(backend: Backend, dtype: torch.dtype) -> None:
    """The products are drawn last, so that all other weights are the same draw."""
    ours, plain = (model(lora, backend, dtype=dtype) for lora in (ALL, NONE))
    for name, weight in plain.named_parameters():
        assert torch.equal(weight, ours.get_parameter(name)), name
    assert torch.equal(out(ours), out(plain))
    starts = [p for name, p in ours.named_parameters() if is_factor(name) and "a_" in name.rpartition(".")[2]]
    for a in starts:
        columns = a.shape[1]
        if a.numel() > 60:
            assert 0.6 < float(a.detach().std() * (3 * columns) ** 0.5) < 1.4


def test_used_experts_factors_have_gradients_frozen_weights_none() -> None:
    decoder = drawn(model())
    freeze(decoder, ALONE)
    result = decoder(tokens(1, 2))
    decoder.logits(result.hidden_BSD).square().sum().backward()
    used_E = result.records[1].assignment.counts_E > 0
    assert 0 < int(used_E.sum()) < 5, "the case needs experts with and without tokens"
    for name, parameter in decoder.named_parameters():
        if not is_factor(name):
            assert parameter.grad is None, name
        elif parameter.ndim == 2:
            assert parameter.grad.any(), name
        else:
            has_E = parameter.grad.flatten(1).any(1)
            assert torch.equal(has_E, used_E), name
    optimizer = build_optimizer(decoder, AdamWConfig())
    optimizer.step()
    kept = {id(parameter) for parameter in optimizer.state}
    trained = {id(p) for name, p in decoder.named_parameters() if is_factor(name)}
    assert kept == trained


def test_base_products_are_made_once_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that each matrix multiplies: in the forward pass, and in the backward pass for its input alone."""
    decoder = drawn(model())
    freeze(decoder, ALONE)
    shapes = {p.data_ptr(): n for n, p in decoder.named_parameters() if p.ndim == 2 and not is_factor(n)}
    experts: Any = decoder.blocks[1].feed_forward.experts
    for leaf in experts.takes_low_rank:
        stacked = getattr(experts, leaf)
        shapes |= {stacked[e].data_ptr(): leaf for e in range(5)}
    rows: Counter[str] = Counter()
    plain = linear.product

    def counted(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        if b.data_ptr() in shapes:
            rows[shapes[b.data_ptr()]] += a.shape[0]
        return plain(a, b, out)

    for module in (linear, per_expert):
        monkeypatch.setattr(module, "product", counted)
    outers: list[tuple[int, ...]] = []
    monkeypatch.setattr(per_expert, "outer", lambda *arguments: outers.append(arguments[2].shape))
    logits = out(decoder, 2, 5)
    router = "blocks.1.feed_forward.router.weight_ED"
    once = {name: 10 for name in shapes.values() if name.startswith("blocks.") and name != router}
    once |= dict.fromkeys(experts.takes_low_rank, 10 * 2)  # a token's two experts
    assert rows == once
    rows.clear()
    logits.square().sum().backward()
    unasked = {f"blocks.0.attention.w_{part}" for part in ("q_QD", "k_GD", "v_GD")}  # of a frozen embedding
    assert rows == {name: n for name, n in once.items() if name not in unasked}
    assert not outers


def test_dropout_drops_what_products_read_and_nothing_else() -> None:
    targets = tuple(target for target in ALL.targets if "router" not in target)
    ours = drawn(model(replace(ALL, targets=targets, dropout=0.4)))
    plain = drawn(model(replace(ALL, targets=targets)))
    assert torch.equal(out(ours.eval()), out(plain.eval()))
    first, again = out(ours.train()), out(ours.train())
    assert torch.equal(first, again), "noise is a function of seed, step, layer and token"
    assert not torch.allclose(first, out(plain))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if is_factor(name) and name.rpartition(".")[2].startswith("b_"):
                parameter.zero_()
    none = model(NONE)
    none.load_state_dict(ours.state_dict(), strict=False)
    torch.testing.assert_close(out(ours.train()), out(none), rtol=1e-12, atol=1e-12)


def test_a_sum_s_factor_may_go_by_the_root_of_the_rank() -> None:
    ours = drawn(model(replace(ALL, rslora=True)))
    by_root = drawn(model(replace(ALL, rslora=False)))
    assert not torch.allclose(out(ours), out(by_root))
    state = ours.state_dict()
    a, b = (state[name] for name in factors(ours)["blocks.0.attention.w_q_QD"])
    more = product(a, b, ALL.alpha / 4**0.5)
    x = torch.randn(3, 23, dtype=torch.float64)
    found = ours.blocks[0].attention.lora_w_q_QD(x)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(found, x @ more.t(), rtol=1e-12, atol=1e-12)


def test_products_count_with_their_matrices() -> None:
    plain, ours = (count_parameters(model(lora)) for lora in (NONE, ALL))
    assert ours.attention - plain.attention == 3 * (4 * (23 + 60) + 3 * (2 * (23 + 20) + 60 + 23))
    assert ours.dense - plain.dense == 2 * 3 * 3 * (23 + 29)
    assert ours.shared - plain.shared == 3 * 3 * (23 + 13)
    assert ours.experts - plain.experts == 5 * 2 * (23 + 26 + 13 + 23)
    assert ours.experts_active - plain.experts_active == 2 * 2 * (23 + 26 + 13 + 23)
    assert ours.router - plain.router == 23 + 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "model.lora.rank=0 must be 1 or more"),
        ({"rank": None}, "model.lora.alpha=5.0 is not used without model.lora.rank"),
        ({"targets": ("*.attention.w_*=x",)}, "x is no rank; write PATTERN=RANK"),
        ({"targets": ()}, "model.lora.targets names nothing"),
        ({"targets": ("*.attention.w_*", "*.atention.*")}, r"\*.atention.\* matches no matrix in a block"),
        ({"targets": ("embed_VD",)}, "embed_VD matches no matrix in a block"),
        ({"targets": ("*.router.*",), "dropout": 0.1}, "whose input cannot be dropped"),
    ],
    ids=["rank", "no rank", "rank of a target", "no target", "misspelt", "embedding", "router's dropout"],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        model(replace(ALL, **changes))


def test_layers_whose_matrix_takes_no_product_say_so() -> None:
    with pytest.raises(UserError, match="shared_gate_1D is read by the layer or the block itself"):
        model(replace(ALL, targets=("*.shared_gate_1D",)), shared_gate=True)
    with pytest.raises(UserError, match=r"w_gate_up_EDCF has rows that stay as they are \(experts\.frozen"):
        model(experts={"frozen": 2})
    with pytest.raises(UserError, match=r"model\.lora\.rank=3 is of experts of one width"):
        model(expert_widths=(13, 5, 7, 11, 3))
