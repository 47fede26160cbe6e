"""The same weights in transformers' models: logits, loss and every gradient.

transformers' own norms and attention weights are fp32 even in an fp64 model, so that fp64 agrees to their
rounding only. Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hf_families import FAMILIES
from hf_family import BATCH, ORIGINAL, transformers
from hf_hybrid import MODULES, wide
from hf_weights import from_hf
from torch import Tensor

from moetrain.models import Decoder, cross_entropy_sum, generate
from moetrain.models.rope import rope_table
from moetrain.models.rope_options import RopeKind, RopeScaling


def assert_alike(
    theirs: Any,
    ours: Decoder,
    ids: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    fp64: float = 2e-6,
) -> None:
    """Logits of what ``mask`` [B, S] says is no padding, the loss, and the gradient of every parameter."""
    dtype = ours.embed_VD.dtype
    in_fp32 = type(theirs).__name__.startswith(("Ernie", "Granite"))  # more of them, whatever the model is in
    wide = dtype is torch.float64 and not in_fp32
    close = {"rtol": fp64, "atol": fp64} if wide else {"rtol": 1e-5, "atol": 1e-5}
    reference = theirs(ids, attention_mask=mask, labels=labels, use_cache=False)
    hidden = ours(ids).hidden_BSD
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert reference.logits.abs().max() > 1
    torch.testing.assert_close(ours.logits(hidden)[real], reference.logits[real], **close)
    total, count = cross_entropy_sum(hidden[:, :-1], ours.head_weight, labels[:, 1:])
    torch.testing.assert_close(total / count, reference.loss.to(dtype), **close)
    reference.loss.backward()
    (total / count).backward()
    expected = from_hf({name: p.grad for name, p in theirs.named_parameters() if p.requires_grad})
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.any(), key
        torch.testing.assert_close(
            parameters[key].grad, gradient, **close, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_logits_loss_and_every_gradient(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    models = family.build(dtype)
    with wide(family.name, dtype):
        assert_alike(*models, *family.batch(), fp64=1e-10 if family.name in MODULES else 2e-6)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_padding_asks_for_nothing_and_changes_nothing(name: str) -> None:
    """Theirs is told by a mask, ours by labels alone: nothing before the padding sees it."""
    family = FAMILIES[name]
    ids, labels = family.batch()
    lengths = torch.tensor([family.seq, 5, 8])
    mask = torch.arange(family.seq) < lengths[:BATCH, None]
    assert_alike(*family.build(torch.float32), ids, labels.where(mask, -100), mask.long())


@pytest.mark.parametrize(
    "name", ["llama", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "moonlight", "gpt_oss"]
)
def test_logits_by_the_default_backend(name: str) -> None:
    family = FAMILIES[name]
    theirs, ours = family.build(torch.float32, "auto")
    ids, _ = family.batch()
    torch.testing.assert_close(ours.logits(ours(ids).hidden_BSD), theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "llama_linear",
        "llama_llama3",
        "llama_yarn",
        "qwen2_yarn",
        "glm4_moe_yarn",
        "deepseek_v3_yarn",
        "ernie4_5_moe_yarn",
        "gpt_oss",
    ],
)
def test_cached_generation_goes_beyond_the_original_positions(name: str) -> None:
    family = FAMILIES[name]
    if name == "gpt_oss":  # else it says the same word on and on
        family = replace(family, theirs={**family.theirs, "initializer_range": 0.3})
    theirs, ours = family.build(torch.float32)
    prompt = family.batch()[0][:1, :5]
    new = ORIGINAL + 3
    reference = theirs.generate(prompt, max_new_tokens=new, do_sample=False)[0, 5:].tolist()
    assert len(set(reference)) > 5
    assert generate(ours, prompt[0].tolist(), new, temperature=0) == reference


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LARGE = [  # head width, rope_theta, scaling, theirs
    (128, 5e5, RopeScaling(RopeKind.llama3, 8.0, 8192), LLAMA3),  # Llama-3.1-8B
    (64, 5e5, RopeScaling(RopeKind.llama3, 32.0, 8192), LLAMA3),  # Llama-3.2-1B
    (128, 1e6, RopeScaling(RopeKind.yarn, 4.0, 32768), {}),  # Qwen2.5 and Qwen3 for 128 k
    (128, 1e4, RopeScaling(RopeKind.yarn, 16.0, 4096, truncate=False), {"truncate": False}),
    (64, 1e4, RopeScaling(RopeKind.yarn, 3.0, 5), {}),  # hardly a turn: the bounds meet
    (64, 1e2, RopeScaling(RopeKind.yarn, 2.0, 8192), {}),  # every pair turns: the upper bound is past all
]


@pytest.mark.parametrize(("width", "theta", "scaling", "theirs"), LARGE)
def test_frequencies_of_published_sizes_and_at_the_edges(
    width: int, theta: float, scaling: RopeScaling, theirs: dict[str, Any]
) -> None:
    rope = {"rope_type": scaling.kind.name, "rope_theta": theta, "factor": scaling.factor, **theirs}
    rope["original_max_position_embeddings"] = scaling.original_max_positions
    config = transformers.LlamaConfig(
        head_dim=width, rope_parameters=rope, max_position_embeddings=131072, num_hidden_layers=1
    )
    compute = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[scaling.kind.name]
    frequency, size = compute(config, torch.device("cpu"))
    table = rope_table(torch.ones(1, 1), width, theta, torch.float32, scaling)
    cos, sin = table.cos_BS1H[0, 0, 0, : width // 2], table.sin_BS1h[0, 0, 0]
    torch.testing.assert_close(torch.atan2(sin, cos), frequency, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.hypot(sin, cos), torch.full((width // 2,), size))
