"""The tables of a decoder's parts, in the names that Hugging Face's Llama-like models share.

Shapes: D model, F hidden, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moetrain.models.attention import head_shape
from moetrain.models.hf.further import FutureNames, block_names, joins
from moetrain.models.hf.latent_table import latent_table
from moetrain.models.hf.pieces import Piece, Table, Tiled
from moetrain.models.options import LATENT, ModelConfig, QKNorm, future_layers, is_moe_layer

_NORMS = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
_SANDWICH = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_out_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class MoENames:
    """What a family calls the parts of an MoE layer, and its norms of queries and keys, within one layer.

    ``stacked``: its files have all experts of a layer in one tensor, in a way of its own.
    """

    router: str = "mlp.gate.weight"
    gate: str = "mlp.experts.{}.gate_proj.weight"
    up: str = "mlp.experts.{}.up_proj.weight"
    down: str = "mlp.experts.{}.down_proj.weight"
    shared: str = "mlp.shared_expert"
    shared_gate: str = "mlp.shared_expert_gate.weight"
    q_norm: str = "self_attn.q_norm.weight"
    k_norm: str = "self_attn.k_norm.weight"
    bias: str | None = None  # of the choice, one number an expert; None: it has none
    bias_rows: int = 0  # dimensions of size 1 before the experts
    aliases: Mapping[str, str] = field(
        default_factory=dict
    )  # what transformers 5's own layout calls otherwise
    stacked: bool = False


def decoder_table(
    cfg: ModelConfig, vocab_size: int, names: MoENames, future: FutureNames | None = None
) -> Table:
    """The table of a whole decoder, dense or MoE per layer."""
    table = {
        "embed_VD": _whole("model.embed_tokens.weight", (vocab_size, cfg.d_model)),
        "norm.weight_D": _whole("model.norm.weight", (cfg.d_model,)),
    }
    if not cfg.tie_embeddings:
        table["head_VD"] = _whole("lm_head.weight", (vocab_size, cfg.d_model))
    for layer in (*range(cfg.num_layers), *future_layers(cfg)):
        ours, theirs = f"blocks.{layer}.", block_names(cfg, future, layer)
        parts = _attention(cfg, names) | (_moe(cfg, names) if is_moe_layer(cfg, layer) else _biased(cfg))
        for name, tiled in parts.items():
            pieces = tuple(replace(piece, theirs=theirs + piece.theirs) for piece in tiled.pieces)
            table[ours + name] = replace(tiled, pieces=pieces)
    return table | joins(cfg, future)


def _attention(cfg: ModelConfig, names: MoENames) -> Table:
    norms = _SANDWICH if cfg.sandwich_norms else _NORMS
    table = {f"{ours}.weight_D": _whole(f"{theirs}.weight", (cfg.d_model,)) for ours, theirs in norms.items()}
    return table | (latent_table(cfg) if cfg.attention == LATENT else _grouped_query(cfg, names))


def _grouped_query(cfg: ModelConfig, names: MoENames) -> Table:
    heads, kv_heads, head_dim = head_shape(cfg)
    widths = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    table = {"attention.w_out_DQ": _whole("self_attn.o_proj.weight", (cfg.d_model, widths["q"]))}
    if cfg.out_bias:
        table["attention.b_out_D"] = _whole("self_attn.o_proj.bias", (cfg.d_model,))
    if cfg.attention_sinks:
        table["attention.b_sink_N"] = _whole("self_attn.sinks", (heads,))
    for part, width in widths.items():
        axis = "Q" if part == "q" else "G"
        shape = (width, cfg.d_model)
        table[f"attention.w_{part}_{axis}D"] = _whole(f"self_attn.{part}_proj.weight", shape)
        if cfg.qkv_bias:
            table[f"attention.b_{part}_{axis}"] = _whole(f"self_attn.{part}_proj.bias", (width,))
    if cfg.qk_norm is not QKNorm.none:
        per_head = cfg.qk_norm is not QKNorm.full
        for part, name in (("q", names.q_norm), ("k", names.k_norm)):
            width = head_dim if per_head else widths[part]
            table[f"attention.{part}_norm.weight_D"] = _whole(name, (width,))
    return table


def _biased(cfg: ModelConfig) -> Table:
    """A dense layer with its biases, where it has some."""
    sizes = {"gate": ("F", cfg.d_ff), "up": ("F", cfg.d_ff), "down": ("D", cfg.d_model)}
    biases = {
        f"feed_forward.b_{part}_{axis}": _whole(f"mlp.{part}_proj.bias", (size,))
        for part, (axis, size) in sizes.items()
    }
    return _dense(cfg) | (biases if cfg.mlp_bias else {})


def _dense(cfg: ModelConfig, ours: str = "feed_forward", theirs: str = "mlp", width: int = 0) -> Table:
    width = width or cfg.d_ff
    return {
        f"{ours}.w_gate_FD": _whole(f"{theirs}.gate_proj.weight", (width, cfg.d_model)),
        f"{ours}.w_up_FD": _whole(f"{theirs}.up_proj.weight", (width, cfg.d_model)),
        f"{ours}.w_down_DF": _whole(f"{theirs}.down_proj.weight", (cfg.d_model, width)),
    }


def _moe(cfg: ModelConfig, names: MoENames) -> Table:
    width, d_model = cfg.d_ff_expert, cfg.d_model
    up: list[Piece] = []
    down: list[Piece] = []
    for e in range(cfg.num_experts):
        for column, name in enumerate((names.gate, names.up)):
            block = ((e, 0, column, 0), (1, d_model, 1, width))
            up.append(Piece(name.format(e), *block, (width, d_model), dims=(3, 1)))
        rows = ((e, 0, 0), (1, width, d_model))
        down.append(Piece(names.down.format(e), *rows, (d_model, width), dims=(2, 1)))
    table = {
        "feed_forward.router.weight_ED": _whole(names.router, (cfg.num_experts, d_model)),
        "feed_forward.router.bias_E": _bias(names, cfg.num_experts),
        "feed_forward.experts.w_gate_up_EDCF": Tiled((cfg.num_experts, d_model, 2, width), tuple(up)),
        "feed_forward.experts.w_down_EFD": Tiled((cfg.num_experts, width, d_model), tuple(down)),
    }
    if cfg.num_shared_experts:
        shared = cfg.shared_width
        table |= _dense(cfg, "feed_forward.shared", names.shared, shared)
    if cfg.shared_gate:
        table["feed_forward.shared_gate_1D"] = _whole(names.shared_gate, (1, d_model))
    return table


def _bias(names: MoENames, num_experts: int) -> Tiled:
    if names.bias is None:
        return Tiled((num_experts,))
    piece = Piece.whole(names.bias, (num_experts,))
    return Tiled((num_experts,), (replace(piece, shape=(1,) * names.bias_rows + piece.shape),))


def _whole(name: str, shape: tuple[int, ...]) -> Tiled:
    return Tiled(shape, (Piece.whole(name, shape),))
