"""The tables of names: they fill every element once, and a config.json says the whole model again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hf_deepseek import specs as deepseek
from hf_hybrid import hybrids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.models import Decoder
from moetrain.models.hf import FAMILIES, Fields, ModelSpec
from moetrain.models.hf.family import CannotExpressError
from moetrain.models.hf.pieces import Piece, Table, Tiled, fill_block
from moetrain.models.hf.tensors import Part
from moetrain.models.latent_options import LatentConfig
from moetrain.models.options import LayerWindow, ModelConfig, QKNorm
from moetrain.models.scale_options import ScalesConfig
from moetrain.moe.options import Activation, ExpertKind, ExpertsConfig
from moetrain.moe.routers.expert_choice import ExpertChoiceOptions
from moetrain.moe.routers.topk import Score, TopKOptions

DENSE = ("llama", "mistral", "qwen2", "qwen3")
WRITTEN = [name for name in FAMILIES if name != "kimi_k2"]  # which goes out as deepseek_v3
QK_NORM = {
    "qwen3": QKNorm.head,
    "qwen3_moe": QKNorm.head,
    "olmoe": QKNorm.full,
    "minimax_m2": QKNorm.full,
    "dots1": QKNorm.head,
    "hunyuan_v1_moe": QKNorm.head_after_rope,
}
HYBRID = ("qwen3_next", "qwen3_5_moe_text")
SIGMOID = ("dots1", "glm4_moe")
AS_DENSE = (  # one key says both widths
    *("mixtral", "olmoe", "minimax_m2", "hunyuan_v1_moe", "granitemoe", "granitemoeshared"),
)
SLIDING, FULL = LayerWindow
PATTERNS = ((), (SLIDING, FULL), (FULL, SLIDING), (SLIDING, SLIDING, FULL), (FULL, SLIDING, SLIDING, FULL))
WINDOWED = ("mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "dots1")


@st.composite
def sigmoid_specs(draw: st.DrawFn, name: str, keys: dict[str, Any], experts: ExpertsConfig) -> ModelSpec:
    """Those of DeepSeek-V3's kind of MoE layer."""
    keys["first_dense"] = draw(st.integers(0, keys["num_layers"] - 1))
    keys["num_shared_experts"] = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2)) if keys["num_experts"] > 1 else 1  # of two experts or more
    keys["num_experts"] *= groups
    limit = draw(st.integers(1, groups))
    router = TopKOptions(
        top_k=draw(st.integers(1, limit * keys["num_experts"] // groups)),
        score=Score.sigmoid,
        renormalize=draw(st.booleans()),
        route_scale=draw(st.sampled_from([1.0, 2.5])),
        num_groups=groups,
        top_groups=limit,
    )
    if name == "glm4_moe":
        keys["qk_norm"] = draw(st.sampled_from([QKNorm.none, QKNorm.head]))
        keys["rope_fraction"] = draw(st.sampled_from([0.5, 1.0])) if keys["head_dim"] % 4 == 0 else 1.0
    keys["qkv_bias"] = draw(st.booleans())
    keys["out_bias"] = name == "dots1" and keys["qkv_bias"]
    return ModelSpec(ModelConfig(**keys), router, experts)


@st.composite
def specs(draw: st.DrawFn, name: str) -> ModelSpec:
    """A random model that the family ``name`` expresses."""
    kv_heads = draw(st.integers(1, 3))
    layers = draw(st.integers(1, 5))
    keys: dict[str, Any] = {
        "vocab_size": draw(st.integers(1, 19)),
        "d_model": draw(st.integers(1, 23)),
        "num_layers": layers,
        "num_heads": kv_heads * draw(st.integers(1, 3)),
        "num_kv_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 4)),
        "d_ff": draw(st.integers(1, 29)),
        "num_experts": 0,
        "qk_norm": QK_NORM.get(name, QKNorm.none),
        "qkv_bias": name == "qwen2" or (name == "qwen2_moe" and draw(st.booleans())),
        "sliding_window": draw(st.none() | st.integers(1, 9)) if name in WINDOWED else None,
        "rope_theta": draw(st.sampled_from([10000.0, 1e6])),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "tie_embeddings": draw(st.booleans()),
    }
    activations = [Activation.swiglu, *([] if name in HYBRID else [Activation.geglu])]
    experts = ExpertsConfig(activation=draw(st.sampled_from(activations)))
    if name.startswith("deepseek"):
        return ModelSpec(*draw(deepseek(name, keys)), experts)
    if name == "llama":
        keys["qkv_bias"] = keys["out_bias"] = draw(st.booleans())
        keys["mlp_bias"] = draw(st.booleans())
    if name in DENSE:
        return ModelSpec(ModelConfig(**keys), experts=experts)
    keys["num_experts"] = draw(st.integers(1, 5))
    keys["d_ff_expert"] = keys["d_ff"] if name in AS_DENSE else draw(st.integers(1, 13))
    if name in SIGMOID:
        return draw(sigmoid_specs(name, keys, experts))
    if name in ("qwen2_moe", "qwen3_moe", "ernie4_5_moe", "qwen3_next"):
        keys["moe_every"] = every = draw(st.integers(1, min(3, layers)))
        keys["first_dense"] = draw(st.integers(0, layers // every * every - 1))  # at least the last is MoE
    if name in HYBRID:
        keys |= draw(hybrids(layers))
    if name == "qwen3_5_moe_text":
        keys["d_ff"] = keys["d_ff_expert"]
    if name in ("qwen2_moe", *HYBRID):
        keys |= {"num_shared_experts": 1, "d_ff_shared": draw(st.integers(1, 17)), "shared_gate": True}
    top_k = draw(st.integers(1, keys["num_experts"]))
    router = TopKOptions(
        top_k=top_k,
        score=Score.softmax,
        renormalize=name in ("ernie4_5_moe", "hunyuan_v1_moe") or (name != "mixtral" and draw(st.booleans())),
    )
    if name == "qwen3_5_moe_text":
        router = replace(router, renormalize=True)
    if name == "hunyuan_v1_moe":
        keys["qkv_bias"] = keys["out_bias"] = draw(st.booleans())
        keys["num_shared_experts"] = 1
    if name == "ernie4_5_moe":
        keys |= {"num_shared_experts": draw(st.integers(0, 3)), "rope_interleaved": True}
    if name in ("granitemoe", "granitemoeshared"):
        keys["qkv_bias"] = keys["out_bias"] = draw(st.booleans())
        keys["scales"] = ScalesConfig(*draw(st.sampled_from([(1.0, 0.3, 0.1, 2.0), (12.0, 1.0, 1.0, 1.0)])))
    if name == "granitemoeshared" and draw(st.booleans()):
        keys |= {"num_shared_experts": 1, "d_ff_shared": draw(st.integers(1, 17))}
    if name in ("mixtral", "granitemoe", "granitemoeshared"):
        router = TopKOptions(top_k=top_k, score=Score.softmax_after)
    if name == "minimax_m2":
        keys["rope_fraction"] = draw(st.sampled_from([0.5, 1.0])) if keys["head_dim"] % 4 == 0 else 1.0
        router = TopKOptions(top_k=top_k, score=Score.sigmoid)
    if name == "gpt_oss":
        keys["d_ff_expert"], keys["attention_sinks"] = keys["d_ff"], True
        keys["qkv_bias"] = keys["out_bias"] = draw(st.booleans())
        keys["sliding_window"] = draw(st.none() | st.integers(1, 9))
        fitting = [pattern for pattern in PATTERNS if len(pattern) <= layers]
        keys["window_pattern"] = draw(st.sampled_from(fitting)) if keys["sliding_window"] else ()
        router = TopKOptions(top_k=top_k, score=Score.softmax_after, logit_bias=True)
        experts = ExpertsConfig(activation=Activation.swiglu_clamped, bias=True)
    return ModelSpec(ModelConfig(**keys), router, experts)


def check_table(table: Table, ours: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the pieces fill each of ``ours`` exactly once, and theirs are used up."""
    if table.keys() != ours.keys():
        raise ValueError(f"the table and the model differ in {sorted(table.keys() ^ ours.keys())}")
    counts: dict[str, Tensor] = {}
    for name, tiled in table.items():
        if tiled.shape != tuple(ours[name].shape):
            raise ValueError(f"{name} is {list(ours[name].shape)}, and the table says {list(tiled.shape)}")
        if not tiled.pieces:
            continue
        count = torch.zeros(ours[name].shape, dtype=torch.uint8)
        for piece in tiled.pieces:
            used = counts.setdefault(piece.theirs, torch.zeros(piece.whole_shape, dtype=torch.uint8))
            used[tuple(slice(o, o + n) for o, n in zip(piece.at, piece.shape, strict=False))] += 1
            view = count
            for dim, (start, size) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
                view = view.narrow(dim, start, size)
            view += 1
            if piece.to_ours(torch.empty(piece.shape, device="meta")).shape != piece.sizes:
                raise ValueError(f"{piece.theirs} has another shape than its block of {name}")
        if not bool((count == 1).all()):
            raise ValueError(f"the pieces of {name} do not fill it exactly once")
    if left := [name for name, used in counts.items() if not bool((used == 1).all())]:
        raise ValueError(f"the pieces of {left[0]} are not all of it, each once")


@pytest.mark.parametrize("name", WRITTEN)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_table_fills_the_model_once_and_a_config_says_it_again(name: str, data: st.DataObject) -> None:
    spec, family = data.draw(specs(name)), FAMILIES[name]
    with torch.device("meta"):
        model = Decoder(spec.model, spec.router, spec.experts, spec.vocab_size)
    check_table(family.table(spec), model.state_dict())
    again = family.read(Fields(family.config(spec), "here"))
    moe = [(layer + 1) % spec.model.moe_every == 0 for layer in range(spec.model.num_layers)]
    first, last = sorted((again.model.first_dense, spec.model.first_dense))
    assert not any(moe[first:last])  # several say the same, where the layers between are dense anyway
    again = replace(again, model=replace(again.model, first_dense=spec.model.first_dense))
    assert again == spec


@settings(max_examples=60, deadline=None, derandomize=True)
@given(name=st.sampled_from(WRITTEN), data=st.data())
def test_a_block_is_a_slice_of_the_whole(name: str, data: st.DataObject) -> None:
    """Of any tensor, at any place; and no more is read than what it takes."""
    table = FAMILIES[name].table(data.draw(specs(name)))
    tiled = table[data.draw(st.sampled_from(sorted(table)))]
    theirs = {piece.theirs: torch.randn(piece.whole_shape) for piece in tiled.pieces}
    whole = torch.empty(tiled.shape)
    fill_block(whole, (0,) * whole.ndim, tiled.pieces, lambda name, part=None: theirs[name])
    offsets = [data.draw(st.integers(0, size)) for size in tiled.shape]
    sizes = [data.draw(st.integers(0, size - o)) for size, o in zip(tiled.shape, offsets, strict=True)]
    read: list[str] = []
    numbers = 0

    def reading(wanted: str, part: Part | None = None) -> torch.Tensor:
        nonlocal numbers
        read.append(wanted)
        found = theirs[wanted] if part is None else theirs[wanted][part]
        numbers += found.numel()
        return found

    block = torch.full(sizes, torch.nan, dtype=torch.float64)
    fill_block(block, offsets, tiled.pieces, reading)
    expected = whole[tuple(slice(o, o + size) for o, size in zip(offsets, sizes, strict=True))]
    assert torch.equal(block, expected.double())
    assert len(read) <= (len(tiled.pieces) if block.numel() else 0)
    assert numbers == (block.numel() if theirs else 0)
    for piece in tiled.pieces:
        at = tuple(slice(o, o + n) for o, n in zip(piece.at, piece.shape, strict=False))
        assert torch.equal(piece.to_theirs(whole), theirs[piece.theirs][at])


def test_a_wrong_table_is_found() -> None:
    ours = {"w": torch.zeros(4, 3)}
    top, bottom = (Piece(name, (start, 0), (2, 3), (2, 3), (0, 1)) for name, start in (("a", 0), ("b", 2)))
    check_table({"w": Tiled((4, 3), (top, bottom))}, ours)
    for pieces in ((top,), (top, top, bottom), (top, replace(bottom, offsets=(1, 0)))):
        with pytest.raises(ValueError, match="exactly once"):
            check_table({"w": Tiled((4, 3), pieces)}, ours)
    with pytest.raises(ValueError, match="another shape"):
        check_table({"w": Tiled((4, 3), (top, replace(bottom, shape=(2, 2))))}, ours)
    with pytest.raises(ValueError, match=r"differ in \['v'\]"):
        check_table({"w": Tiled((4, 3), (top, bottom)), "v": Tiled((1,))}, ours)
    with pytest.raises(ValueError, match="the table says"):
        check_table({"w": Tiled((3, 4), (top, bottom))}, ours)


BASE = ModelConfig(vocab_size=7, d_model=8, num_heads=2, num_layers=2, d_ff=5, num_experts=0)
MOE = replace(BASE, num_experts=3, d_ff_expert=5)
SHARED = replace(MOE, num_shared_experts=1, d_ff_shared=3, shared_gate=True)
NORMED = replace(MOE, qk_norm=QKNorm.full)
TOP2 = TopKOptions(top_k=2)
SIGMOID2 = TopKOptions(top_k=2, score=Score.sigmoid)
HUNYUAN = replace(MOE, num_shared_experts=1, qk_norm=QKNorm.head_after_rope)
ERNIE = replace(MOE, rope_interleaved=True)
PLAIN_SHARED = replace(MOE, num_shared_experts=1)
RELU2 = ExpertsConfig(activation=Activation.relu2)
LATENT = replace(MOE, attention="latent", num_shared_experts=1, rope_interleaved=True)
SCALED, EPS = TopKOptions(renormalize=False), LatentConfig(norm_eps=0.1)


@pytest.mark.parametrize(
    ("name", "spec", "why"),
    [
        ("llama", ModelSpec(MOE, TOP2), "model.num_experts=3"),
        ("llama", ModelSpec(replace(BASE, sliding_window=3)), "model.sliding_window=3"),
        ("llama", ModelSpec(replace(BASE, qkv_bias=True)), "model.out_bias=False"),
        ("mistral", ModelSpec(replace(BASE, qkv_bias=True)), "model.qkv_bias=True"),
        ("mistral", ModelSpec(replace(BASE, mlp_bias=True)), "model.mlp_bias=True"),
        ("llama", ModelSpec(replace(BASE, qk_norm=QKNorm.head)), "model.qk_norm=head"),
        ("llama", ModelSpec(BASE, experts=RELU2), "experts.activation=relu2"),
        ("mistral", ModelSpec(MOE, TOP2), "model.num_experts=3"),
        ("mixtral", ModelSpec(MOE, TOP2, ExpertsConfig(kind=ExpertKind.adapters)), "experts.kind=adapters"),
        ("qwen2", ModelSpec(BASE), "model.qkv_bias=False"),
        ("qwen3", ModelSpec(BASE), "model.qk_norm=none"),
        ("mixtral", ModelSpec(BASE), "model.num_experts=0"),
        ("mixtral", ModelSpec(MOE, TopKOptions(renormalize=False)), "router.renormalize=false"),
        ("mixtral", ModelSpec(MOE, TopKOptions(score=Score.sigmoid)), "router.score=sigmoid"),
        ("mixtral", ModelSpec(MOE, TopKOptions(route_scale=2.5)), "router.route_scale=2.5"),
        ("mixtral", ModelSpec(MOE, TopKOptions(num_groups=3, top_groups=2)), "router.top_groups=2"),
        ("mixtral", ModelSpec(MOE, TopKOptions(eval_capacity_factor=1.5)), "eval_capacity_factor=1.5"),
        ("mixtral", ModelSpec(MOE, ExpertChoiceOptions()), "router=expert_choice"),
        ("mixtral", ModelSpec(replace(MOE, moe_every=2), TOP2), "model.moe_every=2"),
        ("mixtral", ModelSpec(replace(MOE, first_dense=1), TOP2), "model.first_dense=1"),
        ("mixtral", ModelSpec(SHARED, TOP2), "model.num_shared_experts=1"),
        ("olmoe", ModelSpec(replace(NORMED, sliding_window=3), TOP2), "model.sliding_window=3"),
        ("olmoe", ModelSpec(MOE, TOP2), "model.qk_norm=none"),
        ("qwen2_moe", ModelSpec(MOE, TOP2), "model.num_shared_experts=0"),
        ("qwen2_moe", ModelSpec(replace(SHARED, shared_gate=False), TOP2), "model.shared_gate=False"),
        ("qwen2_moe", ModelSpec(BASE), "model.num_experts=0"),
        ("qwen3_moe", ModelSpec(replace(SHARED, qk_norm=QKNorm.head), TOP2), "model.num_shared_experts=1"),
        ("qwen3_moe", ModelSpec(BASE), "model.num_experts=0"),
        ("olmoe", ModelSpec(replace(NORMED, rope_fraction=0.5), TOP2), "model.rope_fraction=0.5"),
        ("ernie4_5_moe", ModelSpec(MOE, TOP2), "model.rope_interleaved=False"),
        ("ernie4_5_moe", ModelSpec(ERNIE, SIGMOID2), "router.score=sigmoid"),
        ("ernie4_5_moe", ModelSpec(ERNIE, replace(TOP2, renormalize=False)), "router.renormalize=False"),
        ("ernie4_5_moe", ModelSpec(ERNIE, replace(TOP2, jitter=0.1)), "router.jitter=0.1"),
        ("ernie4_5_moe", ModelSpec(replace(ERNIE, sliding_window=3), TOP2), "model.sliding_window=3"),
        ("ernie4_5_moe", ModelSpec(replace(SHARED, rope_interleaved=True), TOP2), "model.shared_gate=True"),
        ("hunyuan_v1_moe", ModelSpec(HUNYUAN, SIGMOID2), "router.score=sigmoid"),
        ("hunyuan_v1_moe", ModelSpec(HUNYUAN, replace(TOP2, renormalize=False)), "router.renormalize=False"),
        ("hunyuan_v1_moe", ModelSpec(HUNYUAN, replace(TOP2, jitter=0.1)), "router.jitter=0.1"),
        ("hunyuan_v1_moe", ModelSpec(replace(HUNYUAN, qkv_bias=True), TOP2), "model.out_bias=False"),
        ("hunyuan_v1_moe", ModelSpec(replace(HUNYUAN, sliding_window=3), TOP2), "model.sliding_window=3"),
        ("hunyuan_v1_moe", ModelSpec(replace(HUNYUAN, num_shared_experts=2), TOP2), "d_ff_expert's width=2"),
        ("hunyuan_v1_moe", ModelSpec(replace(HUNYUAN, qk_norm=QKNorm.head), TOP2), "model.qk_norm=head"),
        ("granitemoe", ModelSpec(MOE, SIGMOID2), "router.score=sigmoid"),
        ("granitemoe", ModelSpec(MOE, replace(TOP2, renormalize=False)), "router.renormalize=False"),
        ("granitemoe", ModelSpec(MOE, replace(TOP2, jitter=0.1)), "router.jitter=0.1"),
        ("granitemoe", ModelSpec(replace(MOE, qkv_bias=True), TOP2), "model.out_bias=False"),
        ("granitemoe", ModelSpec(PLAIN_SHARED, TOP2), "model.num_shared_experts=1"),
        ("granitemoe", ModelSpec(MOE, TOP2), "model.scales.attention=null"),
        ("granitemoeshared", ModelSpec(SHARED, TOP2), "model.shared_gate=True"),
        ("granitemoeshared", ModelSpec(replace(MOE, sliding_window=3), TOP2), "model.sliding_window=3"),
        ("mixtral", ModelSpec(replace(MOE, scales=ScalesConfig(residual=0.5)), TOP2), "scales.residual=0.5"),
        ("dots1", ModelSpec(replace(PLAIN_SHARED, qkv_bias=True), SIGMOID2), "model.out_bias=False"),
        ("dots1", ModelSpec(PLAIN_SHARED, SIGMOID2), "model.qk_norm=none"),
        ("llama", ModelSpec(replace(BASE, out_bias=True)), "model.out_bias=True"),
        ("minimax_m2", ModelSpec(NORMED, TOP2), "router.score=softmax"),
        ("minimax_m2", ModelSpec(NORMED, replace(SIGMOID2, renormalize=False)), "router.renormalize=False"),
        ("minimax_m2", ModelSpec(NORMED, replace(SIGMOID2, route_scale=2.0)), "router.route_scale=2.0"),
        ("minimax_m2", ModelSpec(NORMED, replace(SIGMOID2, jitter=0.1)), "router.jitter=0.1"),
        ("minimax_m2", ModelSpec(NORMED, replace(SIGMOID2, num_groups=3, top_groups=2)), "top_groups=2"),
        ("minimax_m2", ModelSpec(MOE, SIGMOID2), "model.qk_norm=none"),
        ("minimax_m2", ModelSpec(replace(NORMED, sliding_window=3), SIGMOID2), "model.sliding_window=3"),
        ("glm4_moe", ModelSpec(BASE), "model.num_experts=0"),
        ("glm4_moe", ModelSpec(MOE, SIGMOID2), "model.num_shared_experts=0"),
        ("glm4_moe", ModelSpec(replace(PLAIN_SHARED, d_ff_shared=3), SIGMOID2), "model.d_ff_shared=3"),
        ("glm4_moe", ModelSpec(replace(SHARED, d_ff_shared=5), SIGMOID2), "model.shared_gate=True"),
        ("glm4_moe", ModelSpec(replace(PLAIN_SHARED, moe_every=2), SIGMOID2), "model.moe_every=2"),
        ("glm4_moe", ModelSpec(replace(PLAIN_SHARED, sliding_window=3), SIGMOID2), "sliding_window=3"),
        ("glm4_moe", ModelSpec(replace(PLAIN_SHARED, rope_interleaved=True), SIGMOID2), "rope_interleaved"),
        ("glm4_moe", ModelSpec(replace(PLAIN_SHARED, qk_norm=QKNorm.full), SIGMOID2), "qk_norm=full"),
        ("glm4_moe", ModelSpec(PLAIN_SHARED, TOP2), "router.score=softmax"),
        ("glm4_moe", ModelSpec(PLAIN_SHARED, replace(SIGMOID2, jitter=0.1)), "router.jitter=0.1"),
        ("qwen3_moe", ModelSpec(replace(LATENT, num_shared_experts=0), TOP2), "model.attention=latent"),
        ("deepseek_v2", ModelSpec(SHARED, TOP2), "model.attention=grouped_query"),
        ("deepseek_v2", ModelSpec(LATENT, TOP2), "router.renormalize=True"),
        ("deepseek_v2", ModelSpec(LATENT, SIGMOID2), "router.score=sigmoid"),
        ("deepseek_v2", ModelSpec(replace(LATENT, sliding_window=3), SCALED), "model.sliding_window=3"),
        ("deepseek_v2", ModelSpec(replace(LATENT, num_experts=0), SCALED), "model.num_experts=0"),
        ("deepseek_v2", ModelSpec(replace(LATENT, moe_every=2), SCALED), "model.moe_every=2"),
        ("deepseek_v2", ModelSpec(replace(LATENT, shared_gate=True), SCALED), "model.shared_gate=True"),
        ("deepseek_v2", ModelSpec(replace(LATENT, d_ff_shared=9), SCALED), "model.d_ff_shared=9"),
        ("deepseek_v2", ModelSpec(replace(LATENT, num_shared_experts=0), SCALED), "num_shared_experts=0"),
        ("deepseek_v2", ModelSpec(replace(LATENT, rope_interleaved=False), SCALED), "rope_interleaved=False"),
        ("deepseek_v3", ModelSpec(replace(LATENT, latent=EPS), SIGMOID2), "norm_eps=0.1"),
        ("deepseek_v3", ModelSpec(LATENT, SCALED), "router.score=softmax"),
        ("deepseek_v3", ModelSpec(LATENT, ExpertChoiceOptions()), "router=expert_choice"),
        ("deepseek_v3", ModelSpec(LATENT, replace(SIGMOID2, eval_capacity_factor=1.5)), "eval_capacity"),
        ("deepseek_v3", ModelSpec(LATENT, replace(SIGMOID2, num_groups=3, top_groups=2)), "two experts"),
        ("kimi_k2", ModelSpec(LATENT, SIGMOID2), "it is written as deepseek_v3"),
        ("qwen3_next", ModelSpec(BASE), "model.num_experts=0"),
        ("qwen3_next", ModelSpec(MOE, TOP2), "model.num_shared_experts=0"),
        ("qwen3_next", ModelSpec(SHARED, TOP2), "model.zero_centered_norms=False"),
        ("qwen3_next", ModelSpec(replace(SHARED, zero_centered_norms=True), TOP2), "attention_gate=False"),
        ("qwen3_next", ModelSpec(replace(SHARED, attention="latent"), TOP2), "not latent"),
        ("qwen3_5_moe_text", ModelSpec(replace(SHARED, moe_every=2), TOP2), "model.moe_every=2"),
        ("llama", ModelSpec(replace(BASE, attention_gate=True)), "model.attention_gate=True"),
        ("moetrain", ModelSpec(replace(BASE, attention="gated_delta")), "model.attention=gated_delta"),
        ("llama", ModelSpec(replace(BASE, zero_centered_norms=True)), "model.zero_centered_norms=True"),
        ("qwen3_moe", ModelSpec(replace(MOE, qk_norm=QKNorm.head, attention_pattern=("gated_delta",)), TOP2),
         "model.attention_pattern=('gated_delta',)"),
    ],
)  # fmt: skip
def test_a_family_says_why_it_cannot(name: str, spec: ModelSpec, why: str) -> None:
    with pytest.raises(CannotExpressError) as error:
        FAMILIES[name].config(spec)
    assert why in str(error.value)


def test_top_k_of_one_renormalised_is_not_lost() -> None:
    """With k = 1 the renormalised weight is 1, and the plain one is the probability."""
    for renormalize in (False, True):
        spec = ModelSpec(replace(MOE, qk_norm=QKNorm.head), TopKOptions(top_k=1, renormalize=renormalize))
        family = FAMILIES["qwen3_moe"]
        assert family.read(Fields(family.config(spec), "here")).router == spec.router
