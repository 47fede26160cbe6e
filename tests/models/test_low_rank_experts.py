"""Experts that are one network with products of their own (MixLoRA): against networks W + B A, in fp64."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from lora_cases import ALL, drawn, explicit, model
from model_cases import tokens
from torch import Tensor
from torch.func import functional_call

from moetrain.errors import UserError
from moetrain.models.count import count_parameters
from moetrain.models.lora_options import LoraConfig
from moetrain.models.wiring_options import Wiring
from moetrain.moe.options import Activation, Backend, ExpertKind, FirstWeights, Keep
from moetrain.moe.routers.moepp import MoEPPOptions
from moetrain.ops import linear
from moetrain.ops.low_rank import starts_at_zero
from moetrain.train.optim.build import freeze

LORA = replace(ALL, targets=("*.attention.w_*", "*.feed_forward.w_up_FD=2", "*.feed_forward.w_*"))
KIND = {"kind": ExpertKind.low_rank}


def of_kind(lora: LoraConfig = LORA, **how: Any) -> Any:
    return model(lora, **{**KIND, **how})


def networks(**how: Any) -> Any:
    return model(LoraConfig(), **{"num_shared_experts": 0, **how})


def out(decoder: Any, ids_BS: Tensor, tensors: dict[str, Tensor] | None = None) -> Tensor:
    """Logits, by the decoder's own parameters or by others in their place."""
    if tensors is None:
        logits: Tensor = decoder.logits(decoder(ids_BS).hidden_BSD)
        return logits
    hidden_BSD = functional_call(decoder, {**dict(decoder.named_buffers()), **tensors}, (ids_BS,)).hidden_BSD
    return hidden_BSD @ tensors["embed_VD"].t()


@pytest.mark.parametrize(
    ("lora", "how", "shape"),
    [
        (LORA, {}, (3, 7)),
        (LORA, {"backend": Backend.loop}, (1, 2)),
        (LORA, {"experts": {"keep": Keep.inputs}}, (3, 7)),
        (LORA, {"experts": {"max_rows_per_rank": 11}}, (3, 7)),
        (LORA, {"experts": {"activation": Activation.relu2}}, (3, 7)),
        (LORA, {"experts": {"activation": Activation.swiglu_clamped}}, (3, 7)),
        (replace(LORA, targets=("*.feed_forward.w_down_DF",)), {}, (3, 7)),
        (replace(LORA, targets=("*.feed_forward.w_gate_FD", "*.router.*=1")), {}, (3, 7)),
        (LORA, {"num_shared_experts": 1}, (3, 7)),
        (LORA, {"router": MoEPPOptions(top_k=2)}, (3, 7)),
    ],
    ids=["all", "loop, empty experts", "inputs kept", "rounds", "plain", "clamped", "down", "gate, router",
         "beside shared", "beside zero"],
)  # fmt: skip
def test_output_and_gradients_are_those_of_explicit_networks(
    lora: LoraConfig, how: dict[str, Any], shape: tuple[int, int]
) -> None:
    ours, ids_BS = drawn(of_kind(lora, **how)), tokens(*shape)
    activation = how.get("experts", {}).get("activation", Activation.swiglu)
    alike = {key: how[key] for key in ("num_shared_experts", "router") if key in how}
    plain = networks(backend=Backend.loop, experts={"activation": activation}, **alike)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in ours.named_parameters()}
    tensors = explicit(ours, leaves)
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in plain.named_parameters()}
    found, expected = out(ours, ids_BS), out(plain, ids_BS, tensors)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for logits in (found, expected):
        logits.square().sum().backward()
    for name, parameter in ours.named_parameters():
        grad, wanted = parameter.grad, leaves[name].grad
        assert grad is not None, name
        assert wanted is not None, name
        assert (grad - wanted).abs().max() <= 1e-10 * max(1, float(wanted.abs().max())), name


def test_base_products_are_made_once_a_token_and_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of experts, and of a token's."""
    decoder = drawn(of_kind())
    freeze(decoder, ["*", "!*.lora_*"])
    layer: Any = decoder.blocks[1].feed_forward
    frozen = [p for p in layer.parameters() if not p.requires_grad and p is not layer.router.weight_ED]
    assert sum(p.nbytes for p in frozen) == 3 * 23 * 13 * 8
    names = {p.data_ptr(): name for name, p in layer.named_parameters(recurse=False)}
    rows: Counter[str] = Counter()
    plain = linear.product

    def counted(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        if b.data_ptr() in names:
            rows[names[b.data_ptr()]] += a.shape[0]
        return plain(a, b, out)

    monkeypatch.setattr(linear, "product", counted)
    logits = out(decoder, tokens(2, 5))
    once = dict.fromkeys(("w_gate_FD", "w_up_FD", "w_down_DF"), 10)
    assert rows == once
    rows.clear()
    logits.square().sum().backward()
    assert rows == once, "for the input's gradient alone"
    assert all(p.grad is None for p in frozen)


def test_it_starts_as_one_network_and_drops_in_training_alone() -> None:
    ids_BS = tokens(3, 7)
    ours, kept = (drawn(of_kind(replace(LORA, dropout=rate))) for rate in (0.4, 0.0))
    assert torch.equal(out(ours.eval(), ids_BS), out(kept.eval(), ids_BS))
    first, again = out(ours.train(), ids_BS), out(ours.train(), ids_BS)
    assert torch.equal(first, again), "noise is a function of seed, step, layer and token"
    assert not torch.allclose(first, out(kept, ids_BS))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if starts_at_zero(name):
                parameter.zero_()
    tensors = explicit(ours, dict(ours.named_parameters()))
    torch.testing.assert_close(out(ours, ids_BS), out(networks(), ids_BS, tensors), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("leaf", ["w_gate_FD", "w_up_FD", "w_down_DF"])
def test_each_product_s_own_input_is_dropped(leaf: str) -> None:
    lora = replace(LORA, targets=(f"blocks.1.feed_forward.{leaf}",), dropout=0.4)
    ours = drawn(of_kind(lora)).train()
    assert not torch.allclose(out(ours, tokens(3, 7)), out(ours.eval(), tokens(3, 7)))


def test_parameters_count_once_the_experts_are_their_products() -> None:
    ours, plain = count_parameters(of_kind()), count_parameters(model(LoraConfig(), num_experts=0, **KIND))
    assert ours.experts == 5 * (3 * (23 + 13) + 2 * (23 + 13) + 3 * (13 + 23))
    assert ours.experts_active * 5 == ours.experts * 2
    products = 2 * (3 * (23 + 29) * 2 + 2 * (23 + 29))
    assert ours.dense == plain.dense - 3 * 23 * (29 - 13) + products


def test_grouped_products_compute_the_same_in_fp32() -> None:
    lora = replace(LORA, targets=("*.feed_forward.w_*=4",))
    widths = {"d_model": 24, "num_heads": 4, "num_kv_heads": 2, "d_ff_expert": 12}
    found = []
    for backend in (Backend.torch, Backend.loop):
        decoder = drawn(of_kind(lora, backend=backend, dtype=torch.float32, **widths))
        out(decoder, tokens(3, 7)).square().mean().backward()
        found.append([parameter.grad for parameter in decoder.parameters()])
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"lora": LoraConfig()}, "experts.kind=low_rank are one network .*: set model.lora.rank"),
        ({"lora": replace(LORA, targets=("*.attention.w_*",))}, r"none matches a matrix of blocks\.1\.feed"),
        ({"experts": {"dropout": 0.1}}, r"experts\.dropout=0\.1 is of experts with matrices of their own"),
        ({"experts": {"frozen": 2}}, "experts.frozen=2 is of experts with matrices of their own"),
        ({"experts": {"bias": True}}, "experts.bias=true is of networks, not of experts.kind=low_rank"),
        ({"experts": {"first_weights": FirstWeights.tenth}}, "first_weights=tenth is of networks"),
        ({"backend": Backend.cpu}, "not by experts.backend=cpu: set experts.backend=auto"),
        ({"wiring": Wiring.shortcut, "num_shared_experts": 1}, "which model.wiring=shortcut takes apart"),
    ],
    ids=["no products", "others' products", "dropout", "frozen", "bias", "first", "backend", "wiring"],
)
def test_what_cannot_be_is_refused(how: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, UserError), match=words):
        of_kind(**{"lora": LORA, **how})
