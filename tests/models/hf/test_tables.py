"""The tables of names: they fill every element once, and a config.json says the whole model again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random

import pytest
import torch
from hf_specs import WRITTEN, specs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.models import Decoder
from moetrain.models.hf import FAMILIES, Fields, ModelSpec
from moetrain.models.hf.family import CannotExpressError
from moetrain.models.hf.further import with_layers
from moetrain.models.hf.pieces import Piece, Table, Tiled, fill_block
from moetrain.models.hf.tensors import Part
from moetrain.models.latent_options import LatentConfig
from moetrain.models.options import ModelConfig, QKNorm
from moetrain.models.scale_options import ScalesConfig
from moetrain.moe.options import Activation, ExpertKind, ExpertsConfig
from moetrain.moe.routers.expert_choice import ExpertChoiceOptions
from moetrain.moe.routers.topk import Score, TopKOptions


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


@pytest.mark.parametrize("name", [n for n in WRITTEN if FAMILIES[n].further])
@settings(max_examples=3, deadline=None, derandomize=True)
@given(data=st.data())
def test_names_fill_such_layers_and_others_are_refused(name: str, data: st.DataObject) -> None:
    spec, family = data.draw(specs(name)), FAMILIES[name]
    most = 1 if family.further.most else 2
    larger = replace(spec, model=with_layers(spec.model, family.further, most))
    with torch.device("meta"):
        model = Decoder(larger.model, larger.router, larger.experts, larger.vocab_size)
    check_table(family.table(larger), model.state_dict())
    assert family.further.key is None or family.config(larger)[family.further.key] == most
    other = replace(larger.model.future, shared_norm=family.further.norm is not None)
    more = replace(larger.model.future, layers=2)
    for future in [other, more] if family.further.most else [other]:
        with pytest.raises(CannotExpressError, match=r"model\.future"):
            family.config(replace(larger, model=replace(larger.model, future=future)))
    with pytest.raises(CannotExpressError, match=r"model\.future\.layers=.*no such layers"):
        replace(family, further=None).config(larger)


@pytest.mark.parametrize("name", WRITTEN)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_block_is_a_slice_of_the_whole(name: str, data: st.DataObject) -> None:
    """Of every tensor, at any place; and no more is read than what it takes."""
    table, drawn = FAMILIES[name].table(data.draw(specs(name))), Random(data.draw(st.integers(0, 2**32)))
    for tiled in {key.split(".", 2)[-1]: tiled for key, tiled in table.items()}.values():  # of one layer each
        for least in (0, 1, 1, 1):
            check_a_block(tiled, drawn, least)


def check_a_block(tiled: Tiled, drawn: Random, least: int) -> None:
    """Of one that has ``least`` or more elements along every dimension."""
    theirs = {piece.theirs: torch.randn(piece.whole_shape) for piece in tiled.pieces}
    whole = torch.empty(tiled.shape)
    fill_block(whole, (0,) * whole.ndim, tiled.pieces, lambda name, part=None: theirs[name][part or ...])
    offsets = [drawn.randint(0, size - least) for size in tiled.shape]
    sizes = [drawn.randint(least, size - o) for size, o in zip(tiled.shape, offsets, strict=True)]
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
    needed = block.numel() if theirs else 0
    for piece in tiled.pieces[:1]:
        if piece.folded and needed:  # what lies between the columns that are wanted comes along
            fast = piece.dims[-1]
            needed = needed // sizes[fast] * piece.sizes[fast]
    assert numbers == needed
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
        ("llama", ModelSpec(replace(BASE, attention="latent")), "model.attention=latent"),
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
