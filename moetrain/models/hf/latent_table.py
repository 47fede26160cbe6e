"""The table of latent attention's tensors, in the names that DeepSeek's models share.

Shapes: D model; R queries' latent, L keys' and values'; Q, P, U and O as in ``models/latent.py``.
"""

from __future__ import annotations

from moetrain.models.hf.pieces import Piece, Table, Tiled
from moetrain.models.options import ModelConfig


def latent_table(cfg: ModelConfig) -> Table:
    """Within one layer."""
    m, heads, d_model = cfg.latent, cfg.num_heads, cfg.d_model
    queries, values = heads * (m.qk_nope_head_dim + m.qk_rope_head_dim), heads * m.v_head_dim
    made = heads * (m.qk_nope_head_dim + m.v_head_dim)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "w_kv_PD": ("kv_a_proj_with_mqa", (m.kv_lora_rank + m.qk_rope_head_dim, d_model)),
        "kv_norm.weight_D": ("kv_a_layernorm", (m.kv_lora_rank,)),
        "w_kv_UL": ("kv_b_proj", (made, m.kv_lora_rank)),
        "w_out_DO": ("o_proj", (d_model, values)),
    }
    if m.q_lora_rank is None:
        shapes["w_q_QD"] = ("q_proj", (queries, d_model))
    else:
        shapes |= {
            "w_q_RD": ("q_a_proj", (m.q_lora_rank, d_model)),
            "q_norm.weight_D": ("q_a_layernorm", (m.q_lora_rank,)),
            "w_q_QR": ("q_b_proj", (queries, m.q_lora_rank)),
        }
    return {
        f"attention.{ours}": Tiled(shape, (Piece.whole(f"self_attn.{theirs}.weight", shape),))
        for ours, (theirs, shape) in shapes.items()
    }
