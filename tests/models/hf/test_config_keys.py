"""Every key of config.json is used as transformers uses it, changes nothing there, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hf_config_cases import CLASSES, read, sizes_of, their_config
from hf_family import transformers

from moetrain.errors import UserError
from moetrain.models.hf import FAMILIES
from moetrain.models.hf.keys import HARMLESS, ONLY


@pytest.mark.parametrize("name", list(CLASSES))
def test_an_absent_key_is_their_default(name: str) -> None:
    """The table, and a whole config against one that says the sizes only."""
    theirs = their_config(name)
    for key, value in FAMILIES[name].defaults.items():
        found = _default(theirs, key)
        if key == "sliding_window" and "use_sliding_window" in FAMILIES[name].defaults:
            found = getattr(their_config(name, use_sliding_window=True), key)
        assert found == value, key
    sizes = sizes_of(name)
    whole = their_config(name, **{k: v for k, v in sizes.items() if k != "model_type"}).to_dict()
    assert read(whole) == read(sizes)


def _default(theirs: Any, key: str) -> Any:
    ropes = theirs.rope_parameters
    if key == "rope_theta":
        return ropes.get("full_attention", ropes)[key]
    if key == "rope_local_base_freq":
        return ropes["sliding_attention"]["rope_theta"]
    return getattr(theirs, "_sliding_window_pattern" if key == "sliding_window_pattern" else key)


@pytest.mark.parametrize("name", list(CLASSES))
def test_no_key_of_theirs_is_unknown(name: str) -> None:
    """Set to a value that no default has, each is used, harmless or refused as one of a single value."""
    whole = their_config(name, **sizes_of(name)).to_dict()
    for key in whole:
        said = ""
        try:
            read(whole | {key: "another"})
        except UserError as error:
            said = str(error)
        assert "is not known here" not in said, key
        harmless = key in HARMLESS or key.startswith("_") or key.endswith("_token_id")
        assert said or harmless or _without_effect(name, key), key


def _without_effect(name: str, key: str) -> bool:
    """A window's keys, where there is none, or where layer_types says which layers have it; groups of a
    greedy choice, layers of files alone, and a width of none."""
    if key in ("n_group", "topk_group"):
        return name == "deepseek_v2"
    if key == "num_nextn_predict_layers" or (name, key) == ("qwen3_5_moe_text", "intermediate_size"):
        return True
    return name.startswith(("qwen", "dots1")) and key in ("sliding_window", "max_window_layers")


def test_what_generation_reads_changes_no_model() -> None:
    keys = transformers.GenerationConfig._get_default_generation_params().keys()
    assert {key for key in keys if key not in HARMLESS and not key.endswith("_token_id")} == set()


@pytest.mark.parametrize(("key", "values"), ONLY.items(), ids=ONLY)
def test_a_key_of_one_value(key: str, values: tuple[Any, ...]) -> None:
    for value in values:
        assert read(sizes_of("mistral") | {key: value}) == read(sizes_of("mistral"))
    with pytest.raises(UserError, match=rf"config.json: {key}=.* is not supported: only"):
        read(sizes_of("mistral") | {key: 17})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"scale_tails": 3}, "scale_tails=3 is not known here"),
        ({"norm_type": "layernorm"}, "norm_type='layernorm' is not known here"),
        ({"architectures": 7}, "architectures=7 is no list"),
        ({"architectures": ["OlmoeForSequenceClassification"]}, "is not the language model"),
        ({"hidden_act": ["silu"]}, "hidden_act="),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers of 2"),
        ({"layer_types": 7}, "layer_types is 7"),
        ({"layer_types": ["${oc.env:HOME}", "x"]}, "layer_types names"),
        ({"num_experts": 4, "num_local_experts": 5}, "num_experts=4, but num_local_experts=5"),
        ({"sliding_window": 5}, "sliding_window=5 is not supported"),
        ({"hidden_size": 2**63}, "hidden_size is 9223372036854775808: at most"),
        ({"vocab_size": 10**300}, "vocab_size is 1000"),
        ({"num_hidden_layers": 2**63}, "but the files hold 4096 layer"),
        ({"rms_norm_eps": 1e999}, "rms_norm_eps is inf"),
        ({"rms_norm_eps": 10**400}, "not a finite number"),
        ({"rope_parameters": 7}, "rope_parameters is 7, not an object"),
        ({"rope_scaling": [1]}, "rope_scaling is [1], not an object"),
        ({"rope_parameters": {"rope_type": []}}, "rope_type=[] is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "turns": 3}}, "turns=3 is not known"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5 must be 1 or more"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"type": "yarn"}}, "factor is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 2}}, "truncate is 2"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0.5}}, "beta_fast=0.5 must be above"),
        ({"rope_theta": None}, "rope_theta is None"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0 must be more than 0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"full_attention": {}}}, "full_attention={} is not known"),
    ],
)  # fmt: skip
def test_a_config_that_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as raised:
        read(sizes_of("olmoe") | values)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def their_code(version: str) -> dict[str, Any]:
    """How the file names the code beside the weights."""
    names = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    files = {"AutoConfig": "configuration_deepseek"}
    return {
        "auto_map": {k: f"{files.get(k, 'modeling_deepseek')}.Deepseek{version}{v}" for k, v in names.items()}
    }


DEEPSEEK_KEYS = {
    "aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1, "moe_layer_freq": 1, "attention_bias": False,
    "pretraining_tp": 1, "head_dim": 16,
}  # fmt: skip
DEEPSEEK_OTHERS = {
    "moe_layer_freq": 2, "ep_size": 8, "attention_bias": True, "num_key_value_heads": 2, "head_dim": 8,
    "qk_head_dim": 17, "n_shared_experts": 0, "q_lora_rank": 0,
    "rope_scaling": {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0},
}  # fmt: skip
# keys that the makers' files have besides, and values that are refused
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "minimax_m2": (
        {
            "attn_type_list": [1, 1], "auto_map": {"AutoConfig": "x.Y"}, "layernorm_full_attention_beta": 1.0,
            "layernorm_linear_attention_beta": 1.0, "layernorm_mlp_beta": 1.0, "mlp_intermediate_size": 99,
            "mtp_transformer_layers": 1, "num_mtp_modules": 3, "qk_norm_type": "per_layer", "rotary_dim": 16,
            "scoring_func": "sigmoid", "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid",
            "use_mtp": True, "use_qk_norm": True, "use_routing_bias": True, "sliding_window": None,
        },
        {
            "attn_type_list": [0, 1], "layernorm_mlp_beta": 2.0, "scoring_func": "softmax",
            "shared_intermediate_size": 8, "use_qk_norm": False, "use_routing_bias": False, "rotary_dim": 3,
            "head_dim": 0, "router_jitter_noise": 0.1,
        },
    ),
    "hunyuan_v1_moe": (
        {
            "auto_map": {"AutoConfig": "x.Y"}, "moe_topk": [1, 1], "moe_intermediate_size": [48, 48],
            "num_shared_expert": [1, 1], "use_qk_norm": True, "use_mixed_mlp_moe": True, "use_cla": False,
            "cla_share_factor": 2, "norm_type": "rms", "moe_drop_tokens": False, "eod_token_id": 3,
        },
        {
            "moe_topk": [1, 2], "moe_intermediate_size": [24, 48], "num_shared_expert": 2, "use_cla": True,
            "use_qk_norm": False, "num_experts": [4], "num_experts_per_tok": 3, "norm_type": "layer",
        },
    ),
    "granitemoeshared": (
        {"shared_intermediate_size": 0, "attention_multiplier": 1},
        {"shared_intermediate_size": -1, "attention_multiplier": 0.0, "logits_scaling": None},
    ),
    "ernie4_5_moe": (
        {
            "auto_map": {"AutoConfig": "x.Y"}, "moe_capacity": [4, 4], "moe_use_aux_free": True,
            "moe_gate_act": "softmax", "num_nextn_predict_layers": 1, "moe_layer_end_index": 1,
        },
        {
            "use_bias": True, "moe_norm_min": 1e-3, "moe_gate_act": "sigmoid", "moe_layer_end_index": 0,
            "moe_layer_interval": 0, "moe_layer_start_index": -1, "moe_use_aux_free": False,
        },
    ),
    "dots1": (
        {"auto_map": {"AutoConfig": "x.Y"}, "layer_types": ["full_attention"] * 2},
        {"n_routed_experts": None, "n_shared_experts": None, "max_window_layers": 1,
         "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "glm4_moe": (
        {"partial_rotary_factor": 0.5, "num_nextn_predict_layers": 1, "use_qk_norm": False},
        {"n_shared_experts": 0, "num_nextn_predict_layers": -1, "partial_rotary_factor": 0.0},
    ),
    "deepseek_v2": (
        {
            **DEEPSEEK_KEYS, **their_code("V2"), "scoring_func": "softmax", "norm_topk_prob": False,
            "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        },
        {
            **DEEPSEEK_OTHERS, **their_code("V3"), "scoring_func": "sigmoid", "norm_topk_prob": True,
            "topk_method": "noaux_tc", "mlp_bias": True,
        },
    ),
    "deepseek_v3": (
        {
            **DEEPSEEK_KEYS, **their_code("V3"), "scoring_func": "sigmoid", "topk_method": "noaux_tc",
            "num_nextn_predict_layers": 1, "n_group": 8, "topk_group": 4,
        },
        {
            **DEEPSEEK_OTHERS, **their_code("V2"), "scoring_func": "softmax", "topk_method": "greedy",
            "num_nextn_predict_layers": -1, "n_group": None, "rope_interleave": 1,
        },
    ),
    "gemma3_text": (
        {
            "sliding_window_pattern": 6, "layer_types": ["sliding_attention"] * 2, "rope_scaling": None,
            "rope_theta": 1e6, "rope_local_base_freq": 1e4, "cache_implementation": "hybrid",
            "_sliding_window_pattern": 6, "use_bidirectional_attention": False, "head_dim": 16,
            "final_logit_softcapping": None, "attn_logit_softcapping": None, "query_pre_attn_scalar": 256,
        },
        {
            "use_bidirectional_attention": True, "final_logit_softcapping": 30.0, "hidden_activation": "tanh",
            "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 0, "sliding_window_pattern": 0,
            "sliding_window": None, "rope_scaling": {"type": "linear", "factor": 8.0}, "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default"}, "rope_local_base_freq": 0.0,
        },
    ),
    "kimi_k2": (
        {**DEEPSEEK_KEYS, **their_code("V3"), "scoring_func": "sigmoid", "num_nextn_predict_layers": 0},
        {"topk_method": "greedy"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_keys_of_the_published_files(name: str) -> None:
    """They say what transformers' class computes anyway; other values are refused by name."""
    same, others = PUBLISHED[name]
    given = sizes_of(name)
    assert read(given | same) == read(given)
    for key, value in others.items():
        with pytest.raises(UserError, match=f"{key}|rope_fraction|model.scales|rope_theta"):
            read(given | {key: value})
