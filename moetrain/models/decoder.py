"""The decoder: blocks of attention and a feed-forward layer that is dense or MoE, by the config.

Shapes: B batch, S sequence, T = B S tokens, D model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.bounds import check_ranges
from moetrain.models.attention import AttentionLayer, plan_of
from moetrain.models.block import Carried, build_block, times
from moetrain.models.cache import KVCache
from moetrain.models.future import FutureBlock, context_ahead, shifted
from moetrain.models.future_rules import check_future
from moetrain.models.lora import add_low_rank, draw_by
from moetrain.models.norm import RMSNorm
from moetrain.models.options import ModelConfig, future_layers, moe_layers, rope_of, window_of
from moetrain.models.rope import Rope, rope_table
from moetrain.models.rope_options import RopeScaling
from moetrain.models.rules import check_model
from moetrain.models.scale_options import ScalesConfig
from moetrain.models.wiring_rules import check_wiring
from moetrain.moe import MoELayer, Router, RouterContext, RoutingRecord
from moetrain.moe.options import ExpertsConfig, RouterConfig
from moetrain.moe.routers import full_options
from moetrain.ops.attention import Plan, seen_keys
from moetrain.ops.embedding import embedding
from moetrain.ops.init import Constant, Normal, parameter, set_initializer

M = TypeVar("M", bound=nn.Module)


class DecoderOutput(NamedTuple):
    """A pytree, as FSDP2 wants of a module's output. ``records``: a block's place -> what its layer told.

    ``ahead``: the hidden states of the layers that predict further tokens, one after the other.
    """

    hidden_BSD: Tensor
    records: dict[int, RoutingRecord]
    ahead: tuple[Tensor, ...] = ()


class Decoder(nn.Module):
    """A language model over ``vocab_size`` tokens. ``logits`` is apart, so that a loss can go by chunks.

    Raises UserError for settings that do not fit (:func:`~moetrain.models.rules.check_model`), ValueError
    for an attention or a feed-forward layer that is not known or refuses its options.
    It holds no tables or buffers of its own, so it can be built on torch.device("meta") and counted there.

    ``compute_dtype`` is that of products and activations, None the parameters' own; whoever sets it lets
    blocks find their parameters in it (``parallel/precision.py``). ``residual_dtype`` is that of the sum that
    blocks add to, None that of activations.
    """

    compute_dtype: torch.dtype | None = None
    residual_dtype: torch.dtype | None = None

    def __init__(
        self, cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, vocab_size: int
    ) -> None:
        super().__init__()
        check_model(cfg)
        check_wiring(cfg)
        check_future(cfg)
        check_ranges(experts, "experts")
        self.cfg, self.vocab_size = cfg, vocab_size
        if cfg.num_experts:
            router = full_options(router).for_vocabulary(vocab_size)
        shape, initializer = (vocab_size, cfg.d_model), Normal(cfg.init_std)
        self.embed_VD = parameter(shape, initializer)
        self.blocks = nn.ModuleList(build_block(cfg, router, experts, i) for i in range(cfg.num_layers))
        self.blocks.extend(FutureBlock(cfg, router, experts, i) for i in future_layers(cfg))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps, cfg.zero_centered_norms)
        self.head_VD = None if cfg.tie_embeddings else parameter(shape, initializer)
        self.reset_parameters()
        add_low_rank(self.blocks, cfg.lora)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, D]: the embedding's own where they are tied."""
        return self.embed_VD if self.head_VD is None else self.head_VD

    def forward(
        self,
        input_ids_BS: Tensor,
        ctx: RouterContext | None = None,
        doc_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        cache: KVCache | None = None,
        documents: int | None = None,
        look_ahead: bool = False,
    ) -> DecoderOutput:
        """Hidden states after the last norm, and what layers told of their routing.

        ``look_ahead``: the layers that predict further tokens compute too, which changes nothing of the rest.

        They are divided by ``model.scales.logits_divisor``, and so is what any head makes of them.

        ``doc_ids_BS``: attention stays within tokens of one id; None is plainly causal. ``positions_BS``:
        None counts from 0, or from the end of ``cache``, which the new tokens then join. ``documents``: no
        row of ``doc_ids_BS`` holds more of them, and each is one run of tokens; None: not known.
        Raises ValueError for documents together with a cache; UserError where
        ``cfg.attention_backend`` does not fit.
        """
        if cache is not None and doc_ids_BS is not None:
            raise ValueError("doc_ids_BS and cache do not go together: a cache holds one document a row")
        (batch, seq), device = input_ids_BS.shape, input_ids_BS.device
        cached = 0 if cache is None else cache.length
        if positions_BS is None:
            positions_BS = torch.arange(cached, cached + seq, device=device)[None]
        ctx = RouterContext.default(batch, seq, device) if ctx is None else ctx
        if ctx.token_ids_T is None:
            ctx = replace(ctx, token_ids_T=input_ids_BS.reshape(-1))
        if ctx.doc_ids_T is None and doc_ids_BS is not None:
            ctx = replace(ctx, doc_ids_T=doc_ids_BS.reshape(-1))
        ctx = replace(ctx, moe_layers=tuple(moe_layers(self.cfg)))
        x_BSD = embedding(input_ids_BS, self.embed_VD)
        compute_dtype = self.compute_dtype or x_BSD.dtype
        x_BSD = times(x_BSD.to(compute_dtype), _embedding_scale(self.cfg.scales, compute_dtype))
        embedded_BSD, own = x_BSD, self.cfg.num_layers
        attentions = self.attentions()[: None if look_ahead else own]
        turns = [(a.rope_dim, *rope_of(self.cfg, place)) for place, a in enumerate(attentions)]
        ropes = {turn: self._rope(positions_BS, compute_dtype, *turn) for turn in dict.fromkeys(turns)}
        kinds = [(a.heads, a.sinks, window_of(self.cfg, place)) for place, a in enumerate(attentions)]
        seen = {
            window: seen_keys(seq, cached, window, doc_ids_BS, documents)
            for window in dict.fromkeys(window for _, _, window in kinds)
        }
        before = None if cache is None else cached
        plans = {
            (heads, sinks, window): plan_of(self.cfg, heads, x_BSD, seen[window], before, sinks)
            for heads, sinks, window in dict.fromkeys(kinds)
        }
        x_BSD = x_BSD.to(self.residual_dtype or compute_dtype)
        records: dict[int, RoutingRecord] = {}
        previous: RoutingRecord | None = None
        carried = Carried()
        ways = [(ropes[turn], plans[kind]) for turn, kind in zip(turns, kinds, strict=True)]
        for layer, (block, (rope, plan)) in enumerate(zip(self.blocks, ways[:own], strict=False)):
            layer_cache = None if cache is None else cache.layers[layer]
            layer_ctx = ctx.at_layer(layer, previous)
            if layer_cache is not None:
                layer_ctx = replace(layer_ctx, seen=cached, memory=layer_cache.memory)
            self._draw(block, layer_ctx)
            x_BSD, record, carried = block(x_BSD, rope, plan, layer_ctx, layer_cache, carried)
            if record is not None:
                records[layer] = previous = record
        hidden_BSD = self.norm(x_BSD, compute_dtype)
        states = [hidden_BSD]
        if look_ahead:
            further, more = self._look_ahead(hidden_BSD, embedded_BSD, ctx, doc_ids_BS, ways[own:])
            states, records = [*states, *further], records | more
        hidden_BSD, *ahead = (times(state_BSD, 1 / self.cfg.scales.logits_divisor) for state_BSD in states)
        return DecoderOutput(hidden_BSD, records, tuple(ahead))

    def _look_ahead(
        self,
        state_BSD: Tensor,
        embedded_BSD: Tensor,
        ctx: RouterContext,
        doc_ids_BS: Tensor | None,
        ways: list[tuple[Rope, Plan]],
    ) -> tuple[list[Tensor], dict[int, RoutingRecord]]:
        """The states of the layers that predict further tokens, normalised, and what they told.

        Places, documents and what is attended to are the decoder's own; tokens stand some places on.
        """
        dtype, states, records = state_BSD.dtype, list[Tensor](), dict[int, RoutingRecord]()
        for depth, (layer, (rope, plan)) in enumerate(zip(future_layers(self.cfg), ways, strict=True), 1):
            layer_ctx = context_ahead(ctx, depth, doc_ids_BS).at_layer(layer, None)
            self._draw(self.blocks[layer], layer_ctx)
            token_BSD = shifted(embedded_BSD, depth)
            read_BSD = state_BSD.to(self.residual_dtype or dtype)
            state_BSD, record, _ = self.blocks[layer](read_BSD, token_BSD, rope, plan, layer_ctx)
            if self.cfg.future.shared_norm:
                state_BSD = self.norm(state_BSD, dtype)
            states.append(state_BSD)
            if record is not None:
                records[layer] = record
        return states, records

    def _draw(self, block: nn.Module, ctx: RouterContext) -> None:
        """Noise for the dropout of low-rank products in ``block``, where there is any."""
        if self.training and self.cfg.lora.dropout:
            draw_by(block, ctx.uniform)

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """[..., D] -> [..., V], in the dtype of the products."""
        return F.linear(hidden_BSD, self.head_weight.to(hidden_BSD.dtype))

    def attentions(self) -> list[AttentionLayer]:
        """Each block's, by its place; so here and below those of layers that predict further tokens."""
        return [block.attention for block in self.blocks]  # type: ignore[misc]

    def moe_layers(self) -> dict[int, list[MoELayer]]:
        """The MoELayers in each block that has any, by its place: its feed-forward layer, or parts of it."""
        return _found(self.blocks, MoELayer)

    def routers(self) -> dict[int, Router]:
        """The router behind each block's record, by its place: the first one in it."""
        return {place: routers[0] for place, routers in _found(self.blocks, Router).items()}

    def reset_parameters(self) -> None:
        """Initialise all weights as normal(init_std), less for what adds to the residual.

        Output projections take init_std / sqrt(2 num_layers), norms 1, biases 0; routers and layers that are
        registered with values of their own keep these.
        """
        keeping = [m for m in self.modules() if getattr(m, "keeps_own_init", False) is True]
        kept = {id(made) for module in keeping for made in module.parameters()}
        std = self.cfg.init_std
        out_std = std / (2 * self.cfg.num_layers) ** 0.5
        for name, made in self.named_parameters():
            if id(made) in kept:
                continue
            if made.ndim == 1 or ".bias_" in name:
                set_initializer(made, Constant(0.0 if ".b_" in name or ".bias_" in name else 1.0))
            else:
                projects_out = ".w_out_" in name or ".w_down_" in name
                set_initializer(made, Normal(out_std if projects_out else std))

    @staticmethod
    def _rope(
        positions_BS: Tensor, dtype: torch.dtype, width: int, theta: float, scaling: RopeScaling
    ) -> Rope:
        wide = torch.promote_types(dtype, torch.float32)
        return rope_table(positions_BS, width, theta, wide, scaling)


def _embedding_scale(scales: ScalesConfig, dtype: torch.dtype) -> float:
    if not scales.round_embedding:
        return scales.embedding
    return float(torch.tensor(scales.embedding, dtype=dtype, device="cpu"))


def _found(blocks: nn.ModuleList, kind: type[M]) -> dict[int, list[M]]:
    found = {place: [m for m in block.modules() if isinstance(m, kind)] for place, block in enumerate(blocks)}
    return {place: modules for place, modules in found.items() if modules}
