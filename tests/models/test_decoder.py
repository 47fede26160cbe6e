"""The decoder as a whole: layer pattern, documents, recompute, autocast, context, initialisation.

Shapes: B batch, S sequence, T = B S tokens, D model.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import own_layer
import pytest
import torch
from model_cases import TINY, VOCAB, decoder, tokens
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moetrain.errors import UserError
from moetrain.models import Decoder, cross_entropy_sum
from moetrain.models.feed_forward import FEED_FORWARDS, build_feed_forward, register_feed_forward
from moetrain.models.options import ModelConfig, QKNorm
from moetrain.moe import MoELayer, RouterContext
from moetrain.moe.options import Activation, ExpertsConfig, RouterConfig
from moetrain.ops.activations import GATED
from moetrain.ops.init import on_meta_device
from moetrain.parallel.apply import parallelize
from moetrain.parallel.materialize import allocate, draw
from moetrain.parallel.mesh import Meshes


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"moe_every": 2}, [1, 3]),
        ({"moe_every": 3}, [2]),
        ({"first_dense": 2}, [2, 3, 4]),
        ({"first_dense": 2, "moe_every": 2}, [3]),
        ({"first_dense": 4}, [4]),
        ({"num_experts": 0}, []),
    ],
)
def test_which_layers_are_moe(changes: dict[str, int], expected: list[int]) -> None:
    model = decoder(num_layers=5, **changes)
    assert list(model.moe_layers()) == expected
    assert all(isinstance(layer, MoELayer) for (layer,) in model.moe_layers().values())
    assert list(model(tokens(2, 3)).records) == expected


@pytest.mark.parametrize("changes", [{}, {"qk_norm": QKNorm.head}, {"sliding_window": 3}, {"first_dense": 1}])
def test_packed_documents_equal_the_documents_apart(changes: dict[str, object]) -> None:
    """Two rows, each of two documents, cut at different places; positions restart."""
    model, ids, cuts = decoder(**changes), tokens(2, 11), (4, 7)
    docs = torch.stack([(torch.arange(11) >= cut).long() for cut in cuts])
    positions = torch.stack([torch.cat([torch.arange(cut), torch.arange(11 - cut)]) for cut in cuts])
    packed = model(ids, doc_ids_BS=docs, positions_BS=positions)
    for b, cut in enumerate(cuts):
        close(packed.hidden_BSD[b, :cut], model(ids[b : b + 1, :cut]).hidden_BSD[0])
        close(packed.hidden_BSD[b, cut:], model(ids[b : b + 1, cut:]).hidden_BSD[0])
    assert (model(ids).hidden_BSD - packed.hidden_BSD).abs().max() > 1e-3


def test_rows_are_independent_and_later_tokens_change_nothing() -> None:
    model, ids = decoder(), tokens(3, 7)
    hidden = model(ids).hidden_BSD
    close(hidden[1:2], model(ids[1:2]).hidden_BSD)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    close(hidden[:, :5], model(changed).hidden_BSD[:, :5])
    assert not torch.equal(hidden[:, 5], model(changed).hidden_BSD[:, 5])


def test_scores_depend_on_distances_only() -> None:
    model, ids = decoder(), tokens(2, 7)
    moved = torch.arange(7)[None] + 5
    close(model(ids, positions_BS=moved).hidden_BSD, model(ids).hidden_BSD, 1e-10)
    stretched = torch.arange(7)[None] * 2
    assert (model(ids, positions_BS=stretched).hidden_BSD - model(ids).hidden_BSD).abs().max() > 1e-3


def loss_and_gradients(model: Decoder, ids: Tensor, docs: Tensor | None = None) -> list[Tensor]:
    out = model(ids, doc_ids_BS=docs)
    total, count = cross_entropy_sum(out.hidden_BSD[:, :-1], model.head_weight, ids[:, 1:])
    aux = sum((r.scores_TE.square().sum() for r in out.records.values()), torch.zeros(()))
    loss = total / count + 0.1 * aux
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def test_recompute_changes_neither_loss_nor_gradients() -> None:
    model, ids = decoder(first_dense=1), tokens(2, 7)
    docs = (torch.arange(7) > 2).long().expand(2, 7)
    plain = loss_and_gradients(model, ids, docs)
    parallelize(model, Meshes(), recompute=True)
    runs = []
    model.blocks[0].attention.register_forward_hook(lambda *_: runs.append(1))
    again = loss_and_gradients(model, ids, docs)
    assert len(runs) == 2
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_recompute_keeps_less_and_leaves_names_and_evaluation() -> None:
    model, ids = decoder(), tokens(2, 7)
    names = list(model.state_dict())

    def saved() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), lambda _: None):
            model(ids)
        return sum(sizes)

    before = saved()
    parallelize(model, Meshes(), recompute=True)
    assert saved() < before / 5
    assert list(model.state_dict()) == names
    with torch.no_grad():
        assert model(ids).hidden_BSD.grad_fn is None


def test_the_output_is_a_pytree_that_wrappers_can_walk() -> None:
    leaves = tree_leaves(decoder()(tokens(2, 3)))
    assert sum(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves) >= 1 + 3
    assert all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves)


def test_each_moe_layer_sees_its_place_tokens_and_predecessor() -> None:
    model, ids, seen = decoder(num_layers=4, first_dense=1), tokens(2, 5), []
    for (layer,) in model.moe_layers().values():
        layer.router.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    ctx = RouterContext(2, 5, torch.tensor([8, 3]), seed=5, step=6)
    records = model(ids, ctx).records
    assert [c.layer for c in seen] == [1, 2, 3]
    assert [c.prev for c in seen] == [None, records[1], records[2]]
    assert all((c.seed, c.step) == (5, 6) and torch.equal(c.sample_ids_B, ctx.sample_ids_B) for c in seen)
    assert all(torch.equal(c.token_ids_T, ids.reshape(-1)) for c in seen)
    assert ctx.token_ids_T is None


def test_autocast_runs_products_alone_in_bf16() -> None:
    model, ids = decoder(torch.float32, first_dense=1), tokens(2, 7)
    dtypes: dict[str, set[torch.dtype]] = {}

    def watch(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: object) -> None:
            first = out[0] if isinstance(out, tuple) else out
            if isinstance(first, Tensor):
                dtypes.setdefault(name, set()).update({args[0].dtype, first.dtype})

        module.register_forward_hook(hook)

    for block in model.blocks:
        watch("block", block)
        watch("norm", block.attention_norm)
        watch("attention", block.attention)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, doc_ids_BS=(torch.arange(7) > 2).long().expand(2, 7))
        logits = model.logits(out.hidden_BSD)
    assert dtypes["block"] == dtypes["norm"] == {torch.float32}
    assert dtypes["attention"] == {torch.float32, torch.bfloat16}
    assert out.hidden_BSD.dtype is torch.float32
    assert logits.dtype is torch.bfloat16
    assert all(
        r.logits_TE.dtype is r.assignment.weights_N.dtype is torch.float32 for r in out.records.values()
    )
    exact = model(ids, doc_ids_BS=(torch.arange(7) > 2).long().expand(2, 7)).hidden_BSD
    assert (out.hidden_BSD - exact).norm() < 0.1 * exact.norm()


def test_tied_and_untied_heads() -> None:
    tied, untied = decoder(tie_embeddings=True), decoder(tie_embeddings=False)
    assert tied.head_weight is tied.embed_VD
    assert "head_VD" not in dict(tied.named_parameters())
    assert untied.head_weight is untied.head_VD
    close(untied.logits(torch.ones(3, 23).double()), untied.head_VD.sum(1).expand(3, VOCAB))
    assert not torch.equal(untied.head_VD, untied.embed_VD)


def test_initialisation_follows_the_generator_and_the_config() -> None:
    def build(seed: int) -> Decoder:
        torch.manual_seed(seed)
        cfg = ModelConfig(
            d_model=64, num_layers=8, first_dense=1, init_std=0.05, num_shared_experts=1, qkv_bias=True
        )
        return Decoder(cfg, RouterConfig(), ExpertsConfig(), 997)

    first, again, other = (dict(build(seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed_VD"], other["embed_VD"])
    scaled = 0.05 / math.sqrt(16)
    for name, parameter in first.items():
        if parameter.ndim == 1:
            expected = 0.0 if ".attention.b_" in name else 1.0
            assert (parameter == expected).all(), name
        elif ".router." not in name:
            std = scaled if "w_out" in name or "w_down" in name else 0.05
            assert abs(parameter.std().item() / std - 1) < 0.1, name


@contextmanager
def no_memory(kind: str) -> Iterator[None]:
    if kind == "meta":
        with torch.device("meta"):
            yield
    else:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            yield


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_a_decoder_is_built_without_memory(kind: str) -> None:
    with no_memory(kind):
        cfg = replace(TINY, d_model=2**15, d_ff_expert=2**17, num_experts=64, head_dim=128)
        model = Decoder(cfg, RouterConfig(), ExpertsConfig(), 10**6)
    assert sum(p.numel() for p in model.parameters()) > 2 * 10**12


@pytest.mark.parametrize(("key", "value"), [("num_layers", 0), ("moe_every", 0), ("sliding_window", 0)])
def test_impossible_sizes_are_refused(key: str, value: int) -> None:
    with pytest.raises(UserError, match=f"model.{key}={value}"):
        decoder(**{key: value})


@pytest.mark.parametrize("activation", list(Activation))
def test_dense_layers_and_shared_experts_share_the_activation(activation: Activation) -> None:
    cfg = replace(TINY, first_dense=1, num_shared_experts=1)
    model = Decoder(cfg, RouterConfig(), ExpertsConfig(activation=activation), VOCAB)
    dense, moe = model.blocks[0].feed_forward, model.blocks[1].feed_forward
    assert [m.activation for m in (dense, moe.experts, moe.shared)] == [activation.value] * 3
    gated = activation.value in GATED
    assert dense.w_up_FD.shape == (29, 23)
    assert (dense.w_gate_FD is not None) == gated


def test_the_feed_forward_registry() -> None:
    assert {"moe", "dense"} <= set(FEED_FORWARDS)
    y, record = build_feed_forward("dense", TINY, RouterConfig(), ExpertsConfig(), 0)(torch.randn(2, 3, 23))
    assert y.shape == (2, 3, 23)
    assert record is None
    with pytest.raises(ValueError, match="unknown feed-forward 'dens'"):
        build_feed_forward("dens", TINY, RouterConfig(), ExpertsConfig(), 0)
    with pytest.raises(ValueError, match="registered already"):
        register_feed_forward("moe")(lambda cfg, router, experts, layer: nn.Identity())


def test_a_plugins_layer_keeps_the_values_that_it_writes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own modules, nn.init, initializers that it declares, and what it computes from any of them."""
    monkeypatch.setitem(FEED_FORWARDS, "dense", own_layer.build)
    torch.manual_seed(3)
    with on_meta_device():
        model = Decoder(replace(TINY, num_layers=1, num_experts=0), RouterConfig(), ExpertsConfig(), VOCAB)
    allocate(model, "cpu")
    draw(model, 5)
    layer = model.blocks[0].feed_forward
    assert isinstance(layer, own_layer.OwnLayer)
    for name, value in own_layer.expected(layer, 3).items():
        assert torch.equal(layer.state_dict()[name], value), name
    assert 1.5 < layer.declared_DD.std() < 2.5
    assert 0 < model.embed_VD.std() < 0.5
