"""A decoder trained with moetrain, for transformers: the function that it computes in evaluation, dropless.

Shapes: B batch, S new tokens, K keys, T = B S tokens, D model, H head width, E experts, F hidden,
C columns a hidden unit (gate and up, or up alone), Q columns of all queries, G of all keys, k experts a
token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_moetrain import MoetrainConfig
from .routing_moetrain import RULES, wide

GATES = {
    "swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu, "drelu": F.relu, "swiglu_clamped": None,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip
PLAIN = {"gelu": F.gelu, "relu": F.relu, "relu2": lambda x: F.relu(x).square(), "silu": F.silu}


def activate(gate: Tensor | None, up: Tensor, name: str) -> Tensor:
    if gate is None:
        return PLAIN[name](up)
    if name == "swiglu_clamped":  # of GPT-OSS
        gate = gate.clamp(max=7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)
    return GATES[name](gate) * (F.relu(up) if name == "drelu" else up)


class Router(nn.Module):
    """x_TD -> weights_TE."""

    def __init__(self, cfg: MoetrainConfig) -> None:
        super().__init__()
        num_experts, d_model, name = cfg.num_experts, cfg.hidden_size, cfg.router["name"]
        self.rule, self.cosine = cfg.routing, name == "cosine"
        self.register_buffer("bias_E", torch.zeros(num_experts))  # for selection only
        if self.cosine:
            self.project_dD = nn.Parameter(torch.empty(self.rule["width"], d_model))
            self.centers_Ed = nn.Parameter(torch.empty(num_experts, self.rule["width"]))
            self.log_inverse_temperature_1 = nn.Parameter(torch.zeros(1))
        else:
            self.weight_ED = nn.Parameter(torch.empty(num_experts, d_model))
        if name == "noisy_topk":  # of the noise in training, kept for training on
            self.noise_weight_ED = nn.Parameter(torch.empty(num_experts, d_model))
        elif name == "blockffn":
            self.scale_E = nn.Parameter(torch.ones(num_experts))
        elif name == "expert_choice":
            self.register_buffer("threshold_E", torch.full((num_experts,), 1 / num_experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        with torch.autocast(x_TD.device.type, enabled=False):
            return RULES[self.rule["rule"]](self, self.cosines(x_TD) if self.cosine else self.logits(x_TD))

    def logits(self, x_TD: Tensor) -> Tensor:
        return F.linear(wide(x_TD), wide(self.weight_ED))

    def cosines(self, x_TD: Tensor) -> Tensor:
        v_Td = F.normalize(F.linear(wide(x_TD), wide(self.project_dD)), dim=-1)
        scale_1 = wide(self.log_inverse_temperature_1).exp().clamp(max=100.0)
        return F.linear(v_Td, F.normalize(wide(self.centers_Ed), dim=-1)) * scale_1


class RMSNorm(nn.Module):
    def __init__(self, width: int, cfg: MoetrainConfig) -> None:
        super().__init__()
        self.eps, self.added = cfg.rms_norm_eps, float(cfg.zero_centered_norms)
        self.weight_D = nn.Parameter(torch.full((width,), 1 - self.added))

    def forward(self, x: Tensor) -> Tensor:
        weight_D = wide(self.weight_D) + self.added
        return F.rms_norm(wide(x), weight_D.shape, weight_D, self.eps).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, d_model: int, d_ff: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.w_gate_FD = nn.Parameter(torch.empty(d_ff, d_model)) if activation in GATES else None
        self.w_up_FD = nn.Parameter(torch.empty(d_ff, d_model))
        self.w_down_DF = nn.Parameter(torch.empty(d_model, d_ff))

    def forward(self, x: Tensor) -> Tensor:
        gate = None if self.w_gate_FD is None else F.linear(x, self.w_gate_FD)
        return F.linear(activate(gate, F.linear(x, self.w_up_FD), self.activation), self.w_down_DF)


class Experts(nn.Module):
    def __init__(self, num_experts: int, d_model: int, d_ff: int, activation: str) -> None:
        super().__init__()
        self.activation, columns = activation, 2 if activation in GATES else 1
        self.w_gate_up_EDCF = nn.Parameter(torch.empty(num_experts, d_model, columns, d_ff))
        self.w_down_EFD = nn.Parameter(torch.empty(num_experts, d_ff, d_model))

    def forward(self, x_TD: Tensor, weights_TE: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for e in weights_TE.any(0).nonzero().flatten().tolist():
            rows = weights_TE[:, e].nonzero().flatten()
            *gate, up = (x_TD[rows] @ w_DF for w_DF in self.w_gate_up_EDCF[e].unbind(1))
            hidden = activate(gate[0] if gate else None, up, self.activation)
            hidden = (hidden * weights_TE[rows, e, None]).to(x_TD.dtype)
            y_TD.index_add_(0, rows, (hidden @ self.w_down_EFD[e]).to(y_TD.dtype))
        return y_TD


class MoE(nn.Module):
    """The experts that the router gives each token, beside the shared ones or on top of them (adapters)."""

    def __init__(self, cfg: MoetrainConfig) -> None:
        super().__init__()
        self.adapters, d_model = cfg.expert_kind == "adapters", cfg.hidden_size
        kind = "gelu" if self.adapters else cfg.activation
        self.router = Router(cfg)
        self.experts = Experts(cfg.num_experts, d_model, cfg.moe_intermediate_size, kind)
        width = cfg.shared_expert_intermediate_size
        self.shared = MLP(d_model, width, cfg.activation) if width else None
        self.shared_gate_1D = nn.Parameter(torch.empty(1, d_model)) if cfg.shared_gate else None

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.shared is None:
            return self.experts(x_TD, self.router(x_TD))
        shared_TD = self.shared(x_TD)
        if self.shared_gate_1D is not None:
            shared_TD = shared_TD * F.linear(x_TD, self.shared_gate_1D).sigmoid()
        return shared_TD + self.experts(shared_TD if self.adapters else x_TD, self.router(x_TD))


class Attention(nn.Module):
    def __init__(self, cfg: MoetrainConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, window_of(cfg, layer)
        self.scale = cfg.scales["attention"]
        self.head_dim, self.qk_norm = cfg.head_dim, cfg.qk_norm
        queries, keys = (n * cfg.head_dim for n in (cfg.num_attention_heads, cfg.num_key_value_heads))
        self.w_q_QD = nn.Parameter(torch.empty(queries, cfg.hidden_size))
        self.w_k_GD = nn.Parameter(torch.empty(keys, cfg.hidden_size))
        self.w_v_GD = nn.Parameter(torch.empty(keys, cfg.hidden_size))
        self.b_q_Q = nn.Parameter(torch.zeros(queries)) if cfg.qkv_bias else None
        self.b_k_G = nn.Parameter(torch.zeros(keys)) if cfg.qkv_bias else None
        self.b_v_G = nn.Parameter(torch.zeros(keys)) if cfg.qkv_bias else None
        self.w_out_DQ = nn.Parameter(torch.empty(cfg.hidden_size, queries))
        if cfg.qk_norm != "none":
            widths = (queries, keys) if cfg.qk_norm == "full" else [cfg.head_dim] * 2
            self.q_norm, self.k_norm = (RMSNorm(width, cfg) for width in widths)

    def forward(self, x_BSD: Tensor, rope: Any, real_BK: Any, past: int, cache: Any) -> Tensor:
        q = F.linear(x_BSD, self.w_q_QD, self.b_q_Q)
        k, v = F.linear(x_BSD, self.w_k_GD, self.b_k_G), F.linear(x_BSD, self.w_v_GD, self.b_v_G)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rope), rotate(k, rope)
        if self.qk_norm == "head_after_rope":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        seen = self.seen(past, q.shape[2], k.shape[2], real_BK, x_BSD.device)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale, enable_gqa=True)
        return F.linear(y.transpose(1, 2).flatten(2), self.w_out_DQ)

    def seen(self, past: int, new: int, keys: int, real_BK: Any, device: torch.device) -> Tensor:
        """[B or 1, 1, S, K]. The keys are the last ones: the cache of a window may keep no others."""
        places = torch.arange(past + new, device=device)
        query_S1, key_K = places[past:, None], places[past + new - keys :]
        seen = (key_K <= query_S1)[None, None]
        if self.window is not None:
            seen = seen & (key_K > query_S1 - self.window)
        if real_BK is None:
            return seen
        return seen & (real_BK[:, None, None, -keys:].bool() | (key_K == query_S1))  # no row of nothing


def window_of(cfg: MoetrainConfig, layer: int) -> int | None:
    """Of a layer, in tokens; None: it sees all before."""
    kinds = getattr(cfg, "layer_types", None)
    return cfg.sliding_window if kinds is None or kinds[layer] == "sliding_attention" else None


def rotate(x_BSNH: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Each element of the first half together with its like in the second."""
    cos, sin = rope
    one, other = x_BSNH.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1).to(x_BSNH.dtype)


class Block(nn.Module):
    def __init__(self, cfg: MoetrainConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(cfg.hidden_size, cfg)
        self.attention = Attention(cfg, layer)
        self.feed_forward_norm = RMSNorm(cfg.hidden_size, cfg)
        self.scale, sandwich = cfg.scales["residual"], cfg.sandwich_norms
        self.attention_out_norm = RMSNorm(cfg.hidden_size, cfg) if sandwich else nn.Identity()
        self.feed_forward_out_norm = RMSNorm(cfg.hidden_size, cfg) if sandwich else nn.Identity()
        sparse = cfg.num_experts and layer >= cfg.first_dense and (layer + 1) % cfg.moe_every == 0
        self.feed_forward = (
            MoE(cfg) if sparse else MLP(cfg.hidden_size, cfg.intermediate_size, cfg.activation)
        )

    def forward(self, x_BSD: Tensor, *attention: Any) -> Tensor:
        y_BSD = self.attention(self.attention_norm(x_BSD), *attention)
        x_BSD = x_BSD + self.attention_out_norm(y_BSD) * self.scale
        y_BSD = self.feed_forward(self.feed_forward_norm(x_BSD).flatten(0, 1)).view_as(x_BSD)
        return x_BSD + self.feed_forward_out_norm(y_BSD) * self.scale


class MoetrainForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MoetrainConfig
    _no_split_modules = ["Block"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["bias_E", "threshold_E"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MoetrainConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            mean = float(parameter.ndim == 1 and not name.startswith("b_"))
            mean = 1 - module.added if isinstance(module, RMSNorm) else mean
            nn.init.normal_(parameter, mean, self.config.initializer_range * (parameter.ndim > 1))

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None,
        past_key_values: Any = None, labels: Any = None, use_cache: bool | None = None,
        logits_to_keep: int = 0, **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """``attention_mask`` [B, K]: 0 for padding, on either side. ``past_key_values``: a DynamicCache."""
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask is {list(attention_mask.shape)}, not [batch, keys]")
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None]
        x_BSD = self.embed_tokens(input_ids)
        scales, dtype = self.config.scales, wide(x_BSD).dtype
        factor = torch.tensor(scales["embedding"], dtype=x_BSD.dtype if scales["round_embedding"] else dtype)
        x_BSD = x_BSD * factor.item()
        own = self.config.window_rope_theta is not None
        ropes = {local: self.rope(position_ids, dtype, local) for local in {False, own}}
        for block in self.blocks:
            rope = ropes[own and block.attention.window is not None]
            x_BSD = block(x_BSD, rope, attention_mask, past, past_key_values)
        hidden_BSD = self.norm(x_BSD)[:, -logits_to_keep:] * (1 / scales["logits_divisor"])
        logits = self.lm_head(hidden_BSD)
        loss = (
            None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def rope(self, position_ids: Tensor, dtype: torch.dtype, local: bool) -> tuple[Tensor, Tensor]:
        """(cos, sin), [B or 1, S, 1, H / 2]; ``local``: of the layers with a window, by their own base."""
        values, width, size = self.config.rope_parameters, self.config.head_dim, 1.0
        if local:
            values = {"rope_type": "default", "rope_theta": self.config.window_rope_theta}
        if values["rope_type"] == "default":
            steps = torch.arange(0, width, 2, device=position_ids.device).to(dtype)
            frequency = 1.0 / values["rope_theta"] ** (steps / width)
        else:
            frequency, size = ROPE_INIT_FUNCTIONS[values["rope_type"]](self.config, position_ids.device)
        angle = position_ids[..., None, None].to(dtype) * frequency.to(dtype)
        return angle.cos() * size, angle.sin() * size
