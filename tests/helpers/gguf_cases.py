"""A small llama, and GGUF files of it in llama.cpp's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_family import transformers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra: hf)")

HEADS, KV_HEADS, HEAD_DIM, WIDTH, FF, LAYERS = 6, 2, 16, 96, 64, 2  # widths are multiples of a block of 32
MERGES = [("h", "e"), ("he", "l"), ("Ġ", "hel"), ("1", "2")]
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def vocabulary() -> list[str]:
    """The 256 bytes, the merges and three special tokens."""
    return [*sorted(ByteLevel.alphabet()), *("".join(m) for m in MERGES), "<|eos|>", "<|im|>", "<tool>"]


def their_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary()), hidden_size=WIDTH, intermediate_size=FF, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, initializer_range=0.1,
        rms_norm_eps=1e-5, max_position_embeddings=777, bos_token_id=None, eos_token_id=260,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def permuted(weight: Tensor, heads: int) -> Tensor:
    """As llama.cpp keeps queries and keys: the two halves of a head side by side."""
    return weight.reshape(heads, 2, HEAD_DIM // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(file: Path, weights: dict[str, Tensor], kind: str, **changed: Any) -> Path:
    """A GGUF file of ``weights`` (by transformers' names), the matrices quantised as ``kind``."""
    writer = gguf.GGUFWriter(file, changed.get("arch", "llama"))
    writer.add_context_length(777)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(changed.get("heads", HEADS))
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(changed.get("rotated", HEAD_DIM))
    writer.add_tokenizer_model(changed.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre("smollm")
    tokens = vocabulary()
    types = [1] * (len(tokens) - 3) + [3, 3, 4]
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    if changed.get("eos", True):
        writer.add_eos_token_id(tokens.index("<|eos|>"))
    quant = gguf.GGMLQuantizationType[kind]
    for name, weight in weights.items():
        outer = name.removesuffix(".weight")
        prefix = ""
        if outer.startswith("model.layers."):
            _, _, layer, outer = outer.split(".", 3)
            prefix = f"blk.{layer}."
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(outer)
        data = (weight if heads is None else permuted(weight, heads)).detach().numpy()
        theirs = f"{prefix}{NAMES.get(outer, outer)}.weight"
        if data.ndim == 1 or kind == "F32":
            writer.add_tensor(theirs, np.ascontiguousarray(data))
        else:
            writer.add_tensor(theirs, gguf.quants.quantize(data, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
