"""Reading a GGUF file as a Hugging Face checkpoint: llama.cpp's names and layouts undone, weights in fp32.

Source: the specification of GGUF in ggml-org/ggml, docs/gguf.md. Needs the package ``gguf`` (extra: hf).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.errors import UserError
from moetrain.models.hf.tensors import Rows, TensorInfo

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


class GGUFFile:
    """A GGUF file of the dense llama architecture. Raises UserError for any other, or a damaged one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            from gguf import GGUFReader
        except ModuleNotFoundError:
            raise UserError(
                f"{path}: reading GGUF needs the package gguf: pip install 'moetrain[hf]'"
            ) from None
        try:
            self._reader = GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise UserError(f"{path} is no intact GGUF file: {error}") from None
        self.metadata = {key: field.contents() for key, field in self._reader.fields.items()}
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama" or self.metadata.get("llama.expert_count"):
            raise UserError(f"{path}: architecture {architecture!r} is not supported: only dense llama is")
        for key in ("rope.scaling.type", "attention.sliding_window"):
            if (found := self.metadata.get(f"llama.{key}")) not in (None, 0, "none"):
                raise UserError(f"{path}: llama.{key}={found!r} is not supported")
        self._stored = {self._their_name(t.name): t for t in self._reader.tensors}
        self.config = self._config()
        self.tensors = {
            name: TensorInfo(tuple(int(n) for n in reversed(t.shape)), torch.float32)
            for name, t in self._stored.items()
        }

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        if rows is not None:
            raise ValueError(f"{name} is no stack")
        from gguf import dequantize

        stored = self._stored[name]
        try:
            weight = torch.tensor(dequantize(stored.data, stored.tensor_type), dtype=torch.float32)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"{self.path}: {stored.name} cannot be read: {error}") from None
        weight = weight.reshape(self.tensors[name].shape)
        heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}
        for part, key in heads.items():
            if name.endswith(f"self_attn.{part}_proj.weight"):
                return _unpermuted(weight, self.config[key])
        return weight

    def _their_name(self, name: str) -> str:
        if name in _OUTER:
            return _OUTER[name]
        block, number, rest = (*name.split(".", 2), "", "")[:3]
        inner = _INNER.get(rest) if block == "blk" and number.isdecimal() else None
        if inner is None:
            raise UserError(f"{self.path}: tensor {name} has no place in a dense llama model")
        return f"model.layers.{number}.{inner}"

    def _config(self) -> dict[str, Any]:
        def value(key: str, default: int | float | None = None) -> Any:
            found = self.metadata.get(f"llama.{key}", default)
            if not isinstance(found, (int, float)):
                raise UserError(f"{self.path}: llama.{key} is {found!r}, not a number")
            return found

        if "model.embed_tokens.weight" not in self._stored:
            raise UserError(f"{self.path}: token_embd.weight is missing")
        heads, width = value("attention.head_count"), value("embedding_length")
        head_dim = value("attention.key_length", width // max(heads, 1))
        if (rotated := value("rope.dimension_count", head_dim)) != head_dim:
            raise UserError(
                f"{self.path}: llama.rope.dimension_count={rotated} is not supported: a head is {head_dim} "
                "wide, and all of it is rotated here"
            )
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": int(self._stored["model.embed_tokens.weight"].shape[1]),
            "hidden_size": width,
            "num_hidden_layers": value("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": value("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": value("feed_forward_length"),
            "hidden_act": "silu",
            "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": value("context_length"),
            "rope_parameters": {"rope_type": "default", "rope_theta": value("rope.freq_base", 10000.0)},
            "tie_word_embeddings": "lm_head.weight" not in self._stored,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
        }


def _unpermuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from llama.cpp's order (pairs side by side) to halves, as rope.py rotates them."""
    width = weight.shape[0] // heads
    return weight.reshape(heads, width // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
