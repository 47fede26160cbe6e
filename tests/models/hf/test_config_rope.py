"""However a config.json says how positions rotate, they rotate as transformers' own module rotates them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hf_config_cases import SIZES, read, sizes_of, their_config
from hf_family import transformers

from moetrain.models.options import rope_of
from moetrain.models.rope import rope_table, rope_width

LINEAR = {"type": "linear", "factor": 3.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
INNER = "original_max_position_embeddings"
ROPES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta at the top": {"rope_theta": 500.0},
    "theta at the top, not inside": {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}},
    "theta at both": {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 70.0}},
    "empty scaling": {"rope_parameters": {"rope_theta": 70.0}, "rope_scaling": {}},
    "scaling beside": {"rope_parameters": {"rope_theta": 70.0}, "rope_scaling": {**YARN, INNER: 32}},
    "scaling with its theta": {"rope_theta": 500.0, "rope_scaling": {**LINEAR, "rope_theta": 9.0}},
    "two types": {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 3.0}},
    "scaling of no type": {"rope_scaling": {"factor": 3.0}},
    "llama3": {"rope_scaling": {**LLAMA3, INNER: 32}},
    "llama3, no length": {"rope_scaling": LLAMA3},
    "llama3, length at the top": {"rope_scaling": LLAMA3, INNER: 16},
    "yarn, length at both": {"rope_scaling": {**YARN, INNER: 32}, INNER: 16},
    "linear, length at the top": {"rope_scaling": LINEAR, INNER: 16},
    "yarn of the old spelling": {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2.0}},
    "yarn, factor null": {"rope_scaling": {**YARN, "factor": None, INNER: 16}},
    "yarn, zeros": {"rope_scaling": {**YARN, INNER: 32, "beta_fast": 0, "beta_slow": None}},
    "yarn, truncate null": {"rope_scaling": {**YARN, INNER: 24, "truncate": None}},
    "yarn, attention": {"rope_scaling": {**YARN, INNER: 32, "attention_factor": 1.7}},
    "yarn, both scales": {"rope_scaling": {**YARN, INNER: 32, "mscale": 1.3, "mscale_all_dim": 0.5}},
    "yarn, one scale": {"rope_scaling": {**YARN, INNER: 32, "mscale": 1.3}},
    "yarn, factor 1": {"rope_scaling": {**YARN, "factor": 1, "mscale": 2.0, "mscale_all_dim": 0.5}},
    "keys of other kinds": {"rope_scaling": {**LINEAR, "beta_fast": 4.0, "mscale": 2.0}},
}  # fmt: skip
TURNED = {
    "rotary_dim": {"rotary_dim": 4},
    "rotary_dim, part": {"rotary_dim": 4, "partial_rotary_factor": 0.5},
}
ALPHA: dict[str, dict[str, Any]] = {
    "no alpha": {},
    "alpha": {"rope_theta": 70.0, "rope_scaling": {"type": "dynamic", "alpha": 30.0, "factor": 1.0}},
}
OF_KINDS: dict[str, dict[str, Any]] = {  # of a family whose layers with a window turn by a base of their own
    "nothing": {},
    "both at the top": {"rope_theta": 500.0, "rope_local_base_freq": 70.0},
    "scaled": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "empty scaling": {"rope_scaling": {}, "rope_theta": 500.0},
    "within": {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 9.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3.0},
    }},
    "some at the top": {
        "rope_theta": 500.0, "rope_parameters": {"full_attention": LINEAR, "sliding_attention": None},
    },
    "scaling over within": {
        "rope_scaling": {"factor": 2.0}, "rope_parameters": {"full_attention": {**LINEAR, "rope_theta": 9.0}},
    },
}  # fmt: skip
WHOLE, PARTLY = ("deepseek_v3", "llama", "mixtral", "qwen3_moe"), ("glm4_moe", "minimax_m2")
PART = "partial_rotary_factor"
PARTS: dict[str, dict[str, Any]] = {  # of families that turn a part of a head
    "nothing": {},
    "null": {PART: None},
    "at the top": {PART: 0.25, "rope_theta": 70.0},
    "inside": {"rope_parameters": {"rope_theta": 70.0, PART: 0.75}},
    "both": {PART: 0.25, "rope_parameters": {"rope_theta": 70.0, PART: 0.75}},
    "of a scaled one": {PART: 0.25, "rope_scaling": {**YARN, INNER: 32}},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "values"),
    [
        pytest.param(name, values, id=f"{what}-{name}")
        for names, cases in (
            (WHOLE, ROPES),
            (PARTLY, PARTS),
            (("minimax_m2",), TURNED),
            (("hunyuan_v1_moe",), ALPHA),
        )
        for what, values in cases.items()
        for name in names
    ],
)
def test_positions_rotate_as_theirs(name: str, values: dict[str, Any]) -> None:
    """Cosine and sine of transformers' own module, which a model of the same config computes with."""
    given = sizes_of(name) | values
    rotary = getattr(transformers.models, name)
    module = getattr(rotary, f"modeling_{name}")
    (kind,) = [part for part in dir(module) if part.endswith("RotaryEmbedding")]
    config = their_config(
        name, **{k: v for k, v in json.loads(json.dumps(given)).items() if k != "model_type"}
    )
    positions_BS = torch.arange(50)[None]
    cos_BSH, sin_BSH = getattr(module, kind)(config)(torch.zeros(1), positions_BS)
    m = read(given).model
    width = rope_width(SIZES["head_dim"], m.rope_fraction)
    ours = rope_table(positions_BS, width, m.rope_theta, torch.float32, m.rope_scaling)
    torch.testing.assert_close(ours.cos_BS1H[:, :, 0], cos_BSH, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.sin_BS1h[:, :, 0], sin_BSH[..., : width // 2], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", OF_KINDS)
def test_layers_with_a_window_rotate_as_theirs(what: str) -> None:
    """And the others; the sixth is the first of them."""
    given = json.loads(json.dumps({**sizes_of("gemma3_text"), **OF_KINDS[what], "num_hidden_layers": 7}))
    config = their_config("gemma3_text", **{k: v for k, v in given.items() if k != "model_type"})
    rotary = transformers.models.gemma3.modeling_gemma3.Gemma3RotaryEmbedding(config)
    m, positions_BS = read(given).model, torch.arange(50)[None]
    for layer, kind in ((0, "sliding_attention"), (5, "full_attention")):
        cos_BSH, sin_BSH = rotary(torch.zeros(1), positions_BS, kind)
        theta, scaling = rope_of(m, layer)
        ours = rope_table(positions_BS, SIZES["head_dim"], theta, torch.float32, scaling)
        torch.testing.assert_close(ours.cos_BS1H[:, :, 0], cos_BSH, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            ours.sin_BS1h[:, :, 0], sin_BSH[..., : SIZES["head_dim"] // 2], rtol=0, atol=1e-5
        )
