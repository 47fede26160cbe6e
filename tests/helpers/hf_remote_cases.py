"""Small models of every kind that ``export family=moetrain`` writes, and their way into transformers.

Importing it skips a test file where transformers is missing. Shapes: B batch, S sequence.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hf_cases import export, transformers, write_tokenizer
from torch import Tensor

from moetrain.config.hydra.compose import compose_train
from moetrain.config.init_from import spec_overrides
from moetrain.convert.model_folder import write_model_folder
from moetrain.data import load_tokenizer
from moetrain.models import Decoder
from moetrain.models.hf import ModelSpec
from moetrain.models.hf.own import exported_routers
from moetrain.models.hf.source import TensorInfo
from moetrain.models.options import LayerWindow, ModelConfig, QKNorm
from moetrain.models.rope_options import RopeKind, RopeScaling
from moetrain.models.scale_options import ScalesConfig
from moetrain.moe.options import Activation, ExpertKind, ExpertsConfig, RouterConfig
from moetrain.moe.routers import ROUTERS
from moetrain.moe.routers.topk import GroupScore, Score, TopKOptions

VOCAB, SEQ = 41, 19
LENGTHS = (SEQ, 7, 13)  # of the padded rows
TINY = ModelConfig(
    vocab_size=VOCAB,
    d_model=23,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    d_ff=29,
    num_experts=7,
    d_ff_expert=13,
    init_std=0.3,
    tie_embeddings=False,
)
DENSE = replace(TINY, num_experts=0)
TWELVE = replace(TINY, num_experts=12)
SHARED = replace(TINY, num_shared_experts=2, d_ff_shared=17, shared_gate=True)
MIXED = replace(TINY, num_layers=5, moe_every=2, first_dense=2, tie_embeddings=True)
LINEAR = RopeScaling(RopeKind.linear, 2.5)
LLAMA3 = RopeScaling(RopeKind.llama3, 8.0, 17, low_freq_factor=0.5, high_freq_factor=3.0)
YARN = RopeScaling(RopeKind.yarn, 4.0, 17, beta_fast=4.0, beta_slow=0.25, truncate=False)
SCALES = ScalesConfig(embedding=4.8, residual=0.7, attention=0.2, logits_divisor=0.6, round_embedding=True)
LOCAL = replace(  # as Gemma's
    MIXED,
    num_layers=4,
    first_dense=1,
    tie_embeddings=False,
    sliding_window=5,
    window_pattern=(LayerWindow.sliding, LayerWindow.full),
    rope_theta=50.0,
    window_rope_theta=7.0,
    rope_scaling=LINEAR,
    zero_centered_norms=True,
    sandwich_norms=True,
    qk_norm=QKNorm.head,
    scales=SCALES,
)
ADAPTERS = ExpertsConfig(kind=ExpertKind.adapters, activation=Activation.geglu)


def routed(name: str, model: ModelConfig = TINY, **options: Any) -> ModelSpec:
    return ModelSpec(model, ROUTERS[name].options(**options))


def activated(activation: Activation) -> ModelSpec:
    return ModelSpec(replace(MIXED, num_shared_experts=1), experts=ExpertsConfig(activation=activation))


GROUPS = TopKOptions(top_k=3, num_groups=4, top_groups=2)
CASES = {
    **{name: routed(name) for name in exported_routers()},
    "default_options": ModelSpec(TINY, RouterConfig("topk")),
    "topk_raw": routed("topk", top_k=3, renormalize=False, route_scale=2.5),
    "topk_one": routed("topk", top_k=1),
    "topk_after": routed("topk", top_k=3, score=Score.softmax_after),
    "groups": ModelSpec(TWELVE, replace(GROUPS, score=Score.sigmoid)),
    "groups_max": ModelSpec(TWELVE, replace(GROUPS, group_score=GroupScore.max)),
    "groups_all": ModelSpec(TWELVE, replace(GROUPS, top_groups=None)),
    "grouped_2": routed("grouped", TWELVE, top_k=4, num_groups=2),
    "sinkhorn_one": routed("sinkhorn", top_k=1),
    "cosine_width": routed("cosine", top_k=3, width=5),
    "threshold_low": routed("threshold", threshold=0.3),
    "threshold_zero": routed("threshold", threshold=0.0),
    "adaptive_wide": routed("adaptive", margin=0.4),
    "one_expert": routed("gshard", replace(TINY, num_experts=1)),
    "shared": ModelSpec(SHARED),
    "mixed": ModelSpec(MIXED),
    "adapters": ModelSpec(MIXED, experts=ADAPTERS),
    "local": ModelSpec(LOCAL, experts=ExpertsConfig(activation=Activation.geglu_tanh)),
    "no_experts": ModelSpec(DENSE),
    "bias_head": ModelSpec(replace(DENSE, qkv_bias=True, qk_norm=QKNorm.head, num_kv_heads=None)),
    "norm_after_rope": ModelSpec(replace(DENSE, qk_norm=QKNorm.head_after_rope)),
    "full_window": ModelSpec(replace(DENSE, qk_norm=QKNorm.full, sliding_window=4)),
    **{f"rope_{s.kind.name}": ModelSpec(replace(DENSE, rope_scaling=s)) for s in (LINEAR, LLAMA3, YARN)},
    **{f"act_{activation.name}": activated(activation) for activation in Activation},
}


def random_model(spec: ModelSpec) -> Decoder:
    """No tensor is zero or one throughout, routers' biases neither."""
    torch.manual_seed(0)
    model = Decoder(spec.model, spec.router, spec.experts, VOCAB)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if tensor.ndim == 1:
                tensor.add_((torch.rand_like(tensor) - 0.5) * (0.3 if ".router." in name else 1.0))
            elif ".router." in name:
                tensor.copy_(torch.randn_like(tensor) * 0.3)
    return model.eval()


def write_ours(model: Decoder, spec: ModelSpec, folder: Path) -> Path:
    """A model folder, as convert and upcycle write it."""
    write_tokenizer(folder.parent / "words", VOCAB)
    tensors = model.state_dict()
    write_model_folder(
        folder,
        compose_train(spec_overrides(spec)),
        load_tokenizer(folder.parent / "words"),
        lambda carried: None,
        {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()},
        tensors.__getitem__,
        {},
    )
    return folder


def exported(spec: ModelSpec, folder: Path, *more: str) -> tuple[Decoder, Path]:
    """Our model, and the folder that transformers reads."""
    model = random_model(spec)
    ours = write_ours(model, spec, folder / "ours")
    return model, export(ours, folder / "out", "family=moetrain", *more)


def load(folder: Path, **options: Any) -> Any:
    """An AssertionError where a tensor is missing, too many or of another shape."""
    theirs, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    complaints = {key: value for key, value in found.items() if value}
    assert not complaints, complaints
    return theirs


def batch() -> tuple[Tensor, Tensor]:
    """(ids, what is no padding), [B, S]."""
    ids_BS = torch.randint(VOCAB, (len(LENGTHS), SEQ), generator=torch.Generator().manual_seed(5))
    return ids_BS, torch.arange(SEQ) < torch.tensor(LENGTHS)[:, None]
