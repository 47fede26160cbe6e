"""Reading a GGUF file as a Hugging Face checkpoint: llama.cpp's names and layouts undone, weights in fp32.

Source: the specification of GGUF in ggml-org/ggml, docs/gguf.md. Needs the package ``gguf`` (extra: hf).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetrain.errors import UserError, quoted
from moetrain.models.hf.gguf_header import StoredTensor, read_header
from moetrain.models.hf.gguf_keys import ARCHITECTURE, unknown_key
from moetrain.models.hf.gguf_rope import linear_factor, llama3_scaling
from moetrain.models.hf.layouts import EMBEDDING, HEAD
from moetrain.models.hf.tensors import Part, TensorInfo

_DIVISORS = "rope_freqs.weight"

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
            from gguf.constants import GGML_QUANT_SIZES
        except ModuleNotFoundError:
            raise UserError(
                f"{path}: reading GGUF needs the package gguf: pip install 'moetrain[hf]'"
            ) from None
        header = read_header(path, {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()})
        self.metadata = header.metadata
        architecture = self.metadata.get("general.architecture")
        if architecture != ARCHITECTURE or self.metadata.get("llama.expert_count"):
            raise UserError(
                f"{path}: architecture {quoted(architecture)} is not supported: only dense llama is"
            )
        if found := unknown_key(self.metadata):
            raise UserError(
                f"{path}: {found[0]}={quoted(self.metadata[found[0]])} is not supported: {found[1]}"
            )
        divisors = header.tensors.pop(_DIVISORS, None)
        self._stored = {self._their_name(name): tensor for name, tensor in header.tensors.items()}
        self.config = self._config(None if divisors is None else self._weight(divisors))
        self.tensors = {name: TensorInfo(t.shape, torch.float32) for name, t in self._stored.items()}

    def read(self, name: str, part: Part | None = None) -> Tensor:
        whole = self._whole(name)
        return whole if part is None else whole[part].clone()

    def _whole(self, name: str) -> Tensor:
        weight = self._weight(self._stored[name])
        heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}
        for part, key in heads.items():
            if name.endswith(f"self_attn.{part}_proj.weight"):
                return _unpermuted(weight, self.config[key])
        return weight

    def _weight(self, stored: StoredTensor) -> Tensor:
        """The numbers of a tensor, as they lie in the file."""
        from gguf import GGMLQuantizationType, dequantize

        kind = GGMLQuantizationType(stored.kind)
        dtype = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(kind.name, "u1")
        data = np.memmap(self.path, np.uint8, "r", stored.start, (stored.nbytes,)).view(dtype)
        try:
            if kind.name == "F64":  # which the package does not know
                weight = torch.tensor(data, dtype=torch.float32)
            else:
                rows = data.reshape(*stored.shape[:-1], -1)
                weight = torch.tensor(dequantize(rows, kind), dtype=torch.float32)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"{self.path}: {stored.name} cannot be read: {error}") from None
        return weight.reshape(stored.shape)

    def _their_name(self, name: str) -> str:
        if name in _OUTER:
            return _OUTER[name]
        block, number, rest = (*name.split(".", 2), "", "")[:3]
        inner = _INNER.get(rest) if block == "blk" and number.isdecimal() and number.isascii() else None
        if inner is None:
            raise UserError(f"{self.path}: tensor {name} has no place in a dense llama model")
        return f"model.layers.{number}.{inner}"

    def _config(self, divisors: Tensor | None) -> dict[str, Any]:
        """config.json in transformers' words. ``divisors``: of each frequency of the rotation."""
        if EMBEDDING not in self._stored or len(self._stored[EMBEDDING].shape) != 2:
            raise UserError(f"{self.path}: token_embd.weight is missing, or no matrix")
        vocab_size, width = self._stored[EMBEDDING].shape
        heads = self._integer("attention.head_count", 1)
        head_dim = self._integer("attention.key_length", 1, width // heads)
        self._equal("vocab_size", vocab_size, "the embedding's rows are")
        self._equal("embedding_length", width, "the embedding's width is")
        self._equal("attention.value_length", head_dim, "a value has a key's width, which is")
        self._equal("rope.dimension_count", head_dim, "all of a head is rotated here, and its width is")
        theta = self._number("rope.freq_base", 10000.0)
        rope = {"rope_theta": theta, **self._scaling(theta, head_dim, divisors)}
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": vocab_size,
            "hidden_size": width,
            "num_hidden_layers": self._integer("block_count", 1),
            "num_attention_heads": heads,
            "num_key_value_heads": self._integer("attention.head_count_kv", 1, heads),
            "head_dim": head_dim,
            "intermediate_size": self._integer("feed_forward_length", 1),
            "hidden_act": "silu",
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self._integer("context_length", 1),
            "rope_parameters": rope,
            "tie_word_embeddings": HEAD not in self._stored,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
        }

    def _scaling(self, theta: float, head_dim: int, divisors: Tensor | None) -> dict[str, Any]:
        try:
            factor = linear_factor(self.metadata)
            if divisors is None:
                return {"rope_type": "linear", "factor": factor} if factor > 1 else {"rope_type": "default"}
            if divisors.shape != (head_dim // 2,):
                raise ValueError(f"{_DIVISORS} is {list(divisors.shape)}, not [{head_dim // 2}]")
            stated = self.metadata.get("llama.rope.scaling.original_context_length")
            found = llama3_scaling(divisors, theta, stated)
            if found and factor > 1:
                raise ValueError(f"{_DIVISORS} beside a linear factor of {factor} is not supported")
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from None
        return found or {"rope_type": "linear" if factor > 1 else "default", "factor": factor}

    def _integer(self, key: str, least: int, default: int | None = None) -> int:
        found = self.metadata.get(f"llama.{key}", default)
        if type(found) is not int:
            raise UserError(f"{self.path}: llama.{key} is {quoted(found)}, not a number")
        if not least <= found < 2**31:
            raise UserError(f"{self.path}: llama.{key}={found} must be {least} or more, and below 2^31")
        return found

    def _number(self, key: str, default: float | None = None) -> float:
        found = self.metadata.get(f"llama.{key}", default)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 < found < math.inf:
            raise UserError(f"{self.path}: llama.{key} is {quoted(found)}, not a number above 0")
        return float(found)

    def _equal(self, key: str, wanted: int, what: str) -> None:
        if (found := self.metadata.get(f"llama.{key}", wanted)) != wanted:
            raise UserError(f"{self.path}: llama.{key}={quoted(found)} is not supported: {what} {wanted}")


def _unpermuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from llama.cpp's order (pairs side by side) to halves, as rope.py rotates them."""
    width = weight.shape[0] // heads
    return weight.reshape(heads, width // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
