"""Low-rank products leave in two ways: added to their matrices, or alone, as peft loads them.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import CASES, convert, export, load_ours, load_theirs, refused, tensors_of, write_theirs
from hf_family import BATCH, SEQ, VOCAB
from lora_cases import drawn, summed
from torch import Tensor

from moetrain.config.hydra.compose import compose_train
from moetrain.config.stored import trained_config
from moetrain.convert.model_folder import write_model_folder
from moetrain.convert.open_model import open_model
from moetrain.models import Decoder
from moetrain.models.hf.source import TensorInfo
from moetrain.models.lora_options import LoraConfig
from moetrain.moe.options import ExpertKind

ALONE = ["*", "!*.lora_*"]
TARGETS = (
    "*.attention.w_q_QD=4",
    "*.attention.w_out_DQ",
    "*.experts.w_down_EFD=2",
    "*.experts.*",
    "*.router.*=1",
)
LORA = LoraConfig(rank=3, alpha=5.0, targets=TARGETS)
CASE = {
    "qwen3_moe": LORA,
    "mixtral": replace(LORA, rslora=True, targets=(*TARGETS[2:], "*.attention.w_k_GD")),
    "qwen2_moe_mixed": replace(LORA, targets=(*TARGETS, "*.shared.w_*", "*.feed_forward.w_*")),
    "qwen3": replace(LORA, targets=("*.attention.w_*", "*.feed_forward.w_*")),
}


def tuned(
    name: str, folder: Path, lora: LoraConfig, frozen: list[str] = ALONE, num_experts: int | None = None
) -> tuple[Path, Path, Decoder]:
    """(their folder, a model folder with products beside its matrices, the latter's decoder in fp32).

    ``num_experts``: of a dense model, whose experts are then products around its networks.
    """
    theirs = write_theirs(CASES[name].their_model(torch.float32), folder / "theirs")
    base = open_model(convert(theirs, folder / "base"), trained_config)
    cfg, experts = replace(base.spec.model, lora=lora), base.spec.experts
    if num_experts is not None:
        cfg = replace(cfg, num_experts=num_experts, d_ff_expert=cfg.d_ff)
        experts = replace(experts, kind=ExpertKind.low_rank)
    torch.manual_seed(3)
    decoder = drawn(Decoder(cfg, base.spec.router, experts, base.spec.vocab_size), std=0.15)
    decoder.load_state_dict({name: base[name] for name in base.weights}, strict=False)
    optim = replace(compose_train([]).optim, frozen=frozen)
    assert base.trained is not None
    trained = replace(base.trained, model=cfg, optim=optim, experts=experts)
    state = decoder.state_dict()
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items()}
    target = folder / "tuned"
    write_model_folder(target, trained, base.tokenizer, base.carry, infos, state.__getitem__, {})
    return theirs, target, decoder.eval()


def ids() -> Tensor:
    return torch.randint(VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=ids()).logits
    return found


@torch.no_grad()
def our_logits(decoder: Decoder) -> Tensor:
    return decoder.logits(decoder(ids()).hidden_BSD)


@pytest.mark.parametrize(
    "name", ["qwen3_moe", *(pytest.param(n, marks=pytest.mark.real) for n in [*CASE][1:])]
)
def test_both_exports_compute_what_adapters_do(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (extra: peft)")
    theirs, target, decoder = tuned(name, tmp_path, CASE[name])
    expected = our_logits(decoder)
    merged = load_theirs(export(target, tmp_path / "merged", "merge=true"))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    plain = load_theirs(theirs)
    assert float((logits(plain) - expected).abs().max()) > 0.05, "the products must matter"
    adapters = export(target, tmp_path / "adapters", "adapters=peft")
    loaded = peft.PeftModel.from_pretrained(plain, str(adapters))
    torch.testing.assert_close(logits(loaded.eval()), expected, rtol=1e-5, atol=1e-5)
    taken = {n for n, _ in loaded.named_parameters() if ".lora_" in n}
    assert len(taken) == len(tensors_of(adapters)), "peft has made no adapter that the file does not fill"
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3", marks=pytest.mark.real)])
def test_experts_around_one_network_leave_with_one_each(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Mixtral, or Qwen3-MoE, of transformers."""
    lora = replace(LORA, targets=("*.attention.w_*", "*.feed_forward.w_up_FD=2", "*.feed_forward.w_down_DF"))
    _, target, decoder = tuned(name, tmp_path, lora, num_experts=5)
    merged = load_theirs(export(target, tmp_path / "merged", "merge=true"))
    torch.testing.assert_close(logits(merged), our_logits(decoder), rtol=1e-5, atol=1e-5)
    where = (f"checkpoint={target}", f"target={tmp_path / 'out'}")
    line = refused(capsys, "export", *where, "adapters=peft")
    assert "peft has no experts of products around one network; merge=true writes the whole model" in line
    assert "(model.lora.rank=3): set merge=true" in refused(capsys, "export", *where)


@pytest.mark.real
def test_a_merged_folder_holds_the_sums(tmp_path: Path) -> None:
    _, target, decoder = tuned("qwen3_moe", tmp_path, LORA)
    back = convert(export(target, tmp_path / "merged", "merge=true"), tmp_path / "back")
    spec, ours = load_ours(back)
    assert spec.model.lora == LoraConfig()
    expected = summed(decoder, LORA)
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name].float(), rtol=1e-6, atol=1e-6)


@pytest.mark.real
def test_peft_s_configuration_says_ranks_and_targets(tmp_path: Path) -> None:
    _, target, _ = tuned("qwen3_moe", tmp_path, LORA)
    folder = export(target, tmp_path / "adapters", "adapters=peft", "dtype=bf16")
    config = json.loads((folder / "adapter_config.json").read_text())
    layer = "model.layers.1"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 5.0, False)
    assert f"{layer}.self_attn.q_proj" in config["target_modules"]
    assert {f"{layer}.mlp.gate.weight", f"{layer}.mlp.experts.down_proj"} < set(config["target_parameters"])
    assert config["rank_pattern"][f"{layer}.self_attn.q_proj"] == 4
    assert {t.dtype for t in tensors_of(folder).values()} == {torch.bfloat16}


def test_what_cannot_leave_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, target, _ = tuned("qwen3_moe", tmp_path, LORA, frozen=["*", "!*.lora_*", "!*norm*"])
    out = f"target={tmp_path / 'out'}"

    def line(folder: Path, *more: str) -> str:
        return refused(capsys, "export", f"checkpoint={folder}", out, *more)

    assert "model.lora.rank=3): set merge=true" in line(target)
    assert "ask for one of them" in line(target, "merge=true", "adapters=peft")
    assert "has no low-rank products" in line(tmp_path / "base", "merge=true")
    assert "were trained too (optim.frozen)" in line(target, "adapters=peft")
    assert "blocks.0.attention_norm.weight_D" in line(target, "adapters=peft")
    assert not (tmp_path / "out").exists()
