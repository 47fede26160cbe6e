"""The same weights in transformers' models: logits, loss, every gradient, and the balance loss.

transformers' own norms and attention weights are fp32 even in an fp64 model, so that fp64 agrees to their
rounding only. Shapes: B batch, S sequence, T = B S tokens, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hf_weights import from_hf
from torch import Tensor

from moetrain.config.schema import ModelConfig, QKNorm
from moetrain.models import Decoder, cross_entropy_sum
from moetrain.moe import RouterContext, Routing, build_router
from moetrain.moe.balance.losses import StepTotals, balance_loss
from moetrain.moe.options import Backend, ExpertsConfig
from moetrain.moe.routers.topk import Score, TopKOptions

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: hf)")

BATCH, SEQ, VOCAB = 3, 11, 97
SHAPE = {"vocab_size": VOCAB, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
OURS = {"num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "tie_embeddings": False, "rope_theta": 5000.0}


@dataclass(frozen=True)
class Family:
    """One published architecture, small: transformers' config and ours."""

    name: str
    theirs: dict[str, Any]
    ours: dict[str, Any]
    router: TopKOptions

    def build(self, dtype: torch.dtype, backend: str = "loop") -> tuple[Any, Decoder]:
        torch.manual_seed(0)
        rope = {"rope_type": "default", "rope_theta": 5000.0}
        config = getattr(transformers, f"{self.name}Config")(
            **{**SHAPE, **self.theirs}, rope_parameters=rope, initializer_range=0.2, tie_word_embeddings=False
        )
        config._attn_implementation = config._experts_implementation = "eager"
        theirs = getattr(transformers, f"{self.name}ForCausalLM")(config).to(dtype)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.rand_like(parameter) - 0.5)
        cfg = ModelConfig(**{**OURS, **self.ours})
        ours = Decoder(cfg, self.router, ExpertsConfig(backend=Backend(backend)), VOCAB).to(dtype)
        missing, unexpected = ours.load_state_dict(from_hf(theirs.state_dict()), strict=False)
        assert unexpected == []
        assert all(name.endswith("router.bias_E") for name in missing)
        return theirs, ours


MIXTRAL = Family(
    "Mixtral",
    {
        "hidden_size": 31,
        "head_dim": 14,
        "intermediate_size": 37,
        "num_local_experts": 7,
        "rms_norm_eps": 1e-5,
    },
    {"d_model": 31, "head_dim": 14, "num_experts": 7, "d_ff_expert": 37, "norm_eps": 1e-5},
    TopKOptions(top_k=2, score=Score.softmax_after),
)
MIXTRAL_WINDOW = Family(
    "Mixtral", {**MIXTRAL.theirs, "sliding_window": 4}, {**MIXTRAL.ours, "sliding_window": 4}, MIXTRAL.router
)
QWEN3 = Family(
    "Qwen3Moe",
    {
        "hidden_size": 31,
        "head_dim": 14,
        "moe_intermediate_size": 23,
        "num_experts": 11,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
    },
    {
        "d_model": 31,
        "head_dim": 14,
        "num_experts": 11,
        "d_ff_expert": 23,
        "norm_eps": 1e-6,
        "qk_norm": QKNorm.head,
    },
    TopKOptions(top_k=3, score=Score.softmax, renormalize=True),
)
QWEN3_MIXED = Family(  # the first layer dense, then every layer with an even number (from 1)
    "Qwen3Moe",
    {**QWEN3.theirs, "decoder_sparse_step": 2, "mlp_only_layers": [0], "intermediate_size": 41},
    {**QWEN3.ours, "moe_every": 2, "first_dense": 1, "d_ff": 41},
    QWEN3.router,
)
OLMOE = Family(
    "Olmoe",
    {
        "hidden_size": 60,
        "intermediate_size": 23,
        "num_experts": 11,
        "num_experts_per_tok": 3,
        "rms_norm_eps": 1e-5,
        "pad_token_id": None,  # a padding token's embedding would get no gradient
        "eos_token_id": None,
    },
    {"d_model": 60, "num_experts": 11, "d_ff_expert": 23, "norm_eps": 1e-5, "qk_norm": QKNorm.full},
    TopKOptions(top_k=3, score=Score.softmax, renormalize=False),
)
FAMILIES = {
    "mixtral": MIXTRAL,
    "mixtral_window": MIXTRAL_WINDOW,
    "qwen3": QWEN3,
    "qwen3_mixed": QWEN3_MIXED,
    "olmoe": OLMOE,
}


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (BATCH, SEQ), generator=generator)
    return ids, ids.where(torch.rand(BATCH, SEQ, generator=generator) > 0.2, -100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_logits_loss_and_every_gradient(name: str, dtype: torch.dtype) -> None:
    theirs, ours = FAMILIES[name].build(dtype)
    ids, labels = batch()
    reference = theirs(ids, labels=labels, use_cache=False)
    hidden = ours(ids).hidden_BSD
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-6, "atol": 2e-6}
    assert reference.logits.abs().max() > 1
    torch.testing.assert_close(ours.logits(hidden), reference.logits, **close)
    total, count = cross_entropy_sum(hidden[:, :-1], ours.head_weight, labels[:, 1:])
    torch.testing.assert_close(total / count, reference.loss.to(dtype), **close)
    reference.loss.backward()
    (total / count).backward()
    expected = from_hf({name: p.grad for name, p in theirs.named_parameters()})
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.any(), key
        torch.testing.assert_close(
            parameters[key].grad, gradient, **close, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "olmoe"])
def test_logits_by_the_default_backend(name: str) -> None:
    theirs, ours = FAMILIES[name].build(torch.float32, "auto")
    ids, _ = batch()
    torch.testing.assert_close(ours.logits(ours(ids).hidden_BSD), theirs(ids).logits, rtol=1e-5, atol=1e-5)


def our_balance(records: list[Routing]) -> list[Tensor]:
    totals = StepTotals(num_tokens=BATCH * SEQ)
    return [balance_loss(r, "sum_over_k", "micro", totals, layer) for layer, r in enumerate(records)]


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "olmoe"])
def test_balance_loss_and_its_gradient_are_theirs_with_one_moe_layer(name: str) -> None:
    """Their form is sum_over_k, which is k at perfect balance: k times the switch form."""
    family = FAMILIES[name]
    single = replace(
        family, theirs={**family.theirs, "num_hidden_layers": 1}, ours={**family.ours, "num_layers": 1}
    )
    theirs, ours = single.build(torch.float32)
    ids, _ = batch()
    reference = theirs(ids, labels=ids, output_router_logits=True).aux_loss
    records = ours(ids).records
    (loss,) = our_balance(records)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-5)
    switch = balance_loss(records[0], "switch", "micro", StepTotals(num_tokens=BATCH * SEQ))
    torch.testing.assert_close(loss, family.router.top_k * switch)
    reference.backward()
    loss.backward()
    gate = theirs.model.layers[0].mlp.gate.weight.grad
    assert gate.abs().max() > 1e-3
    torch.testing.assert_close(ours.moe_layers()[0].router.weight_ED.grad, gate, rtol=1e-5, atol=1e-5)


def routing_of(logits_TE: Tensor, top_k: int) -> Routing:
    """What a top-k router makes of given logits, as one row of a batch."""
    router = build_router("topk", d_model=logits_TE.shape[1], num_experts=logits_TE.shape[1], top_k=top_k)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(logits_TE.shape[1]))
    return router(logits_TE, RouterContext.default(1, logits_TE.shape[0]))


def test_with_several_layers_we_hold_to_the_sum_over_layers_and_theirs_pools_them() -> None:
    """transformers averages load and probability over all layers before multiplying them.

    Two layers that each use their own half of the experts then look balanced to it: it gives k, the value
    at perfect balance, and a gradient of nothing. The Switch Transformer defines the loss per layer and adds;
    each of these layers is at twice its optimum.
    """
    pooled = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func
    num_experts, top_k, tokens = 4, 2, 7
    half = torch.full((tokens, num_experts), -20.0)
    first, second = half.clone(), half.clone()
    first[:, :2], second[:, 2:] = 20.0, 20.0
    theirs = pooled((first, second), num_experts, top_k)
    ours = [
        balance_loss(routing_of(logits, top_k), "sum_over_k", "micro", StepTotals(tokens))
        for logits in (first, second)
    ]
    torch.testing.assert_close(theirs, torch.tensor(float(top_k)))
    for loss in ours:
        torch.testing.assert_close(loss, torch.tensor(2.0 * top_k))
    torch.testing.assert_close(pooled((first,), num_experts, top_k), ours[0])


def test_on_a_real_model_their_pooled_value_is_another_number() -> None:
    theirs, ours = QWEN3.build(torch.float32)
    ids, _ = batch()
    records = ours(ids).records
    reference = theirs(ids, labels=ids, output_router_logits=True).aux_loss
    mean_of_layers = torch.stack(our_balance(records)).mean()
    load = torch.stack([r.counts_E.float() for r in records]).mean(0) / (BATCH * SEQ)
    probability = torch.stack([r.scores_TE.mean(0) for r in records]).mean(0)
    torch.testing.assert_close(reference, 11 * (load * probability).sum(), rtol=1e-5, atol=1e-5)
    assert abs(reference - mean_of_layers) > 0.01
