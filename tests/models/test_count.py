"""Parameter and operation counts: published totals, a counter that watches the products, and by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from model_cases import TINY, VOCAB, decoder, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moetrain.config.hydra.compose import compose_train
from moetrain.models import count_parameters, flops_per_token
from moetrain.models.count import abstract_decoder, flops_breakdown
from moetrain.models.future_options import FutureConfig
from moetrain.models.options import LayerWindow, ModelConfig, QKNorm
from moetrain.models.scale_options import ScalesConfig
from moetrain.moe.options import Activation, ExpertsConfig
from moetrain.moe.routers.topk import TopKOptions
from moetrain.train.options import TrainConfig

# Hugging Face's names of the same shapes (config.json of the published checkpoints).
PUBLISHED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "olmoe_1b_7b": (6_919_161_856, "Olmoe", {"intermediate_size": 1024, "pad_token_id": None}),
    "mixtral_8x7b": (46_702_792_704, "Mixtral", {}),
    "qwen3_30b_a3b": (30_532_122_624, "Qwen3Moe", {"num_hidden_layers": 48, "head_dim": 128}),
    "qwen3_next_80b_a3b": (79_674_391_296, "Qwen3Next", {}),
    "gpt_oss_20b": (20_914_757_184, "GptOss", {"num_hidden_layers": 24, "num_local_experts": 32}),
}
ACTIVE = {  # GPT-OSS's 3.6 B leave the embedding out
    "olmoe_1b_7b": 1_282_017_280,
    "mixtral_8x7b": 12_879_925_248,
    "qwen3_30b_a3b": 3_353_032_704,
    "qwen3_next_80b_a3b": 3_874_929_408,
    "gpt_oss_20b": 3_608_307_264 + 201_088 * 2880,
}


def composed(*overrides: str) -> TrainConfig:
    return compose_train(list(overrides))


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_totals(name: str) -> None:
    cfg = composed(f"experiment={name}")
    assert cfg.model == composed(f"model={name}").model
    assert cfg.model.vocab_size is not None
    counts = count_parameters(abstract_decoder(cfg.model, cfg.router, cfg.experts, cfg.model.vocab_size))
    assert counts.total == PUBLISHED[name][0]
    assert counts.active == ACTIVE[name]
    assert counts.embedding == counts.head == cfg.model.vocab_size * cfg.model.d_model


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_transformers_counts_the_same(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: hf)")
    total, family, changes = PUBLISHED[name]
    with torch.device("meta"):
        config = getattr(transformers, f"{family}Config")(**changes)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == total


def test_tiny_and_its_dense_twin_cost_the_same_but_the_router() -> None:
    moe, dense = composed("model=tiny"), composed("model=tiny_dense")
    costs = [flops_breakdown(c.model, c.router, 256, 4096, c.experts) for c in (moe, dense)]
    assert costs[0].experts == costs[1].dense
    assert costs[0].forward - costs[0].router == costs[1].forward
    assert costs[0].router < 0.01 * costs[0].forward
    assert replace(moe.model, num_experts=0) == replace(dense.model, d_ff=moe.model.d_ff)


def test_small_has_about_a_hundred_million() -> None:
    cfg = composed("model=small")
    counts = count_parameters(abstract_decoder(cfg.model, cfg.router, cfg.experts, 4096))
    assert 90e6 < counts.total < 110e6


CASES = [
    {},
    {"num_experts": 0},
    {"first_dense": 1, "tie_embeddings": False},
    {"moe_every": 2, "num_shared_experts": 3, "shared_gate": True, "qk_norm": QKNorm.full, "num_kv_heads": 6},
    {"sliding_window": 4, "num_kv_heads": 1, "qkv_bias": True},
    {"first_dense": 1, "out_bias": True, "mlp_bias": True, "scales": ScalesConfig(2.0, 0.5, 0.3, 0.7)},
]


@pytest.mark.parametrize("changes", CASES)
def test_operations_equal_those_that_a_counter_sees(changes: dict[str, Any]) -> None:
    """With products that skip nothing and pad nothing: full scores, and expert rows not rounded up."""
    torch.manual_seed(0)
    cfg, batch, seq = replace(TINY, **changes), 2, 7
    model = decoder(torch.float32, top_k=3, **changes)
    for (layer,) in model.moe_layers().values():
        layer.dispatcher.block = 1
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.logits(model(tokens(batch, seq)).hidden_BSD)
    expected = flops_breakdown(cfg, TopKOptions(top_k=3), seq, VOCAB, causal=False)
    assert counter.get_total_flops() == batch * seq * expected.forward
    assert expected.training == 3 * expected.forward


def test_parameters_by_kind_add_up() -> None:
    changes = {"num_shared_experts": 2, "d_ff_shared": 17, "shared_gate": True, "qkv_bias": True}
    model = decoder(first_dense=1, tie_embeddings=False, top_k=3, **changes)
    counts = count_parameters(model)
    assert counts.total == sum(p.numel() for p in model.parameters())
    width, hidden, experts, moe_layers = 23, 13, 5, 2
    assert counts.experts == moe_layers * experts * 3 * width * hidden
    assert counts.experts_active == moe_layers * 3 * 3 * width * hidden
    assert counts.shared == moe_layers * (3 * width * 17 + width)
    assert counts.router == moe_layers * experts * width
    assert counts.dense == 3 * width * 29
    assert counts.attention == 3 * (width * 10 * (6 + 2 + 2) + 10 * 6 * width)
    assert counts.norms == (2 * 3 + 1) * width
    assert counts.biases == 3 * 10 * (6 + 2 + 2)
    assert counts.embedding == counts.head == VOCAB * width
    assert counts.active == counts.total - counts.experts + counts.experts_active


def test_a_tied_matrix_counts_once_but_its_product_is_there() -> None:
    tied, untied = decoder(tie_embeddings=True), decoder(tie_embeddings=False)
    assert count_parameters(tied).head == 0
    assert count_parameters(untied).total - count_parameters(tied).total == VOCAB * 23
    costs = [
        flops_per_token(replace(TINY, tie_embeddings=tie), TopKOptions(), 7, VOCAB) for tie in (True, False)
    ]
    assert costs[0] == costs[1]


@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
def test_causal_scores_count_the_keys_that_each_query_sees(window: int | None) -> None:
    seq, cfg = 7, replace(TINY, sliding_window=window)
    seen = sum(1 for i in range(seq) for j in range(seq) if i - (window or seq) < j <= i)
    scores = flops_breakdown(cfg, TopKOptions(), seq, VOCAB).scores
    assert scores == pytest.approx(3 * 2 * 2 * 6 * 10 * seen / seq)


def test_plain_activations_have_two_matrices() -> None:
    gated, plain = (
        flops_breakdown(replace(TINY, first_dense=1), TopKOptions(), 7, VOCAB, ExpertsConfig(activation=a))
        for a in (Activation.swiglu, Activation.gelu)
    )
    assert (plain.experts * 3, plain.dense * 3) == (gated.experts * 2, gated.dense * 2)
    assert plain.dense > 0
    with pytest.raises(ValueError, match="give vocab_size"):
        flops_per_token(ModelConfig(), TopKOptions(), 7)
    assert flops_per_token(replace(TINY, vocab_size=VOCAB), TopKOptions(), 7) == flops_per_token(
        TINY, TopKOptions(), 7, VOCAB
    )


def test_windows_of_some_layers_and_biases_in_the_operations() -> None:
    """A layer's scores are those of its own window; biases are no products."""
    router, plain = TopKOptions(top_k=2), ExpertsConfig(activation=Activation.swiglu_clamped)
    full, sliding, mixed = (
        flops_breakdown(replace(TINY, num_layers=3, **windows), router, 11, VOCAB, plain)
        for windows in (
            {},
            {"sliding_window": 4},
            {"sliding_window": 4, "window_pattern": (LayerWindow.sliding, LayerWindow.full)},
        )
    )
    assert mixed.scores == pytest.approx((2 * sliding.scores + full.scores) / 3)
    biased = replace(TINY, num_layers=3, qkv_bias=True, out_bias=True, attention_sinks=True)
    found = flops_breakdown(biased, replace(router, logit_bias=True), 11, VOCAB, replace(plain, bias=True))
    assert found == full


def test_layers_that_look_ahead_cost_in_training_alone() -> None:
    cfg = replace(TINY, num_shared_experts=1)
    plain, further = (
        abstract_decoder(replace(cfg, future=FutureConfig(layers=n)), TopKOptions(top_k=2), None, VOCAB)
        for n in (0, 2)
    )
    before, counts = count_parameters(plain), count_parameters(further)
    assert counts.total == sum(p.numel() for p in further.parameters())
    assert counts.active == before.active
    assert before.ahead == 0
    width = TINY.d_model
    block = (before.active - before.embedding - before.head - width) // TINY.num_layers  # all alike
    assert counts.ahead == 2 * (block + 2 * width * width + 3 * width)
    assert counts.experts == before.experts * 5 // 3
    flops = [flops_breakdown(m.cfg, TopKOptions(top_k=2), 7, VOCAB, causal=False) for m in (plain, further)]
    assert flops[0].forward == flops[1].forward
    norms = 2 * (2 + 1) * width + 2 * 2 * width
    scores = 2 * flops[0].scores / 3
    assert flops[1].ahead == 2 * (counts.ahead - norms) + scores + 2 * 2 * VOCAB * width
    assert flops[1].training == 3 * (flops[1].forward + flops[1].ahead)
