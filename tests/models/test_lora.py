"""Low-rank products beside matrices that stay (LoRA): the function, its gradients, what upcycling makes.

Shapes: B batch, S sequence, D model, N rows and K columns of a matrix, R rank.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from model_cases import TINY, VOCAB, decoder, tokens
from torch import Tensor
from upcycle_cases import SEED, config, dense_state, experts_config, target

from moetrain.cli import main
from moetrain.config.stored import trained_config
from moetrain.convert.open_model import open_model
from moetrain.errors import UserError
from moetrain.models import Decoder
from moetrain.models.count import count_parameters
from moetrain.moe.options import ExpertKind
from moetrain.moe.routers.topk import TopKOptions
from moetrain.upcycle import AdaptersOptions, upcycle

RANK, ALPHA = 3, 5.0
LORA: dict[str, Any] = {"lora_rank": RANK, "lora_alpha": ALPHA}
MATRIX = {  # of each product's module, the matrix beside it
    "lora_q": "w_q_QD", "lora_k": "w_k_GD", "lora_v": "w_v_GD", "lora_out": "w_out_DQ",
    "lora_gate": "w_gate_FD", "lora_up": "w_up_FD", "lora_down": "w_down_DF",
}  # fmt: skip


def adapters(seed: int = 0, **changes: Any) -> Decoder:
    """The second of three layers is dense, the others are adapters on one network."""
    torch.manual_seed(seed)
    cfg = replace(TINY, moe_every=2, **changes)
    experts = experts_config("swiglu", ExpertKind.adapters)
    return Decoder(cfg, TopKOptions(top_k=2), experts, VOCAB).double()


def drawn(model: Decoder) -> Decoder:
    """With products that are not zero."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
    return model


def merged(model: Decoder) -> dict[str, Tensor]:
    """The same function's tensors without products, by numpy."""
    state = {name: tensor.numpy(force=True) for name, tensor in model.state_dict().items()}
    for name in [name for name in state if name.endswith(".b_NR")]:
        module, _, _ = name.rpartition(".")
        layer, _, leaf = module.rpartition(".")
        product = np.einsum("nr,rk->nk", state[name], state[f"{module}.a_RK"])
        state[f"{layer}.{MATRIX[leaf]}"] = state[f"{layer}.{MATRIX[leaf]}"] + product * (ALPHA / RANK)
    return {name: torch.from_numpy(value) for name, value in state.items() if ".lora_" not in name}


@pytest.mark.parametrize("make", [decoder, adapters])
def test_output_and_gradients_are_those_of_the_sum(make: Any) -> None:
    model, plain = drawn(make(**LORA)), make()
    plain.load_state_dict(merged(model))
    ids_BS = tokens(3, 7)
    for each in (model, plain):
        each.logits(each(ids_BS).hidden_BSD).square().sum().backward()
    found, expected = (m.logits(m(ids_BS).hidden_BSD) for m in (model, plain))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    theirs = dict(plain.named_parameters())
    seen = 0
    for name, parameter in model.named_parameters():
        if name in theirs:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-9, atol=1e-9)
            continue
        module, _, factor = name.rpartition(".")
        layer, _, leaf = module.rpartition(".")
        dw_NK = theirs[f"{layer}.{MATRIX[leaf]}"].grad
        assert dw_NK is not None
        other = model.get_parameter(f"{module}.{'b_NR' if factor == 'a_RK' else 'a_RK'}")
        grad = other.t() @ dw_NK if factor == "a_RK" else dw_NK @ other.t()
        torch.testing.assert_close(parameter.grad, grad * (ALPHA / RANK), rtol=1e-9, atol=1e-9)
        seen += 1
    assert seen == 2 * (3 * 4 + 3 * (3 if make is adapters else 0))


def test_a_model_starts_as_without() -> None:
    """All other weights are another draw of torch's generator; they are copied over."""
    model, plain = adapters(**LORA), adapters()
    model.load_state_dict(plain.state_dict() | {n: t for n, t in model.state_dict().items() if ".lora_" in n})
    ids_BS = tokens(2, 5)
    assert torch.equal(model(ids_BS).hidden_BSD, plain(ids_BS).hidden_BSD)
    firsts = [p for name, p in model.named_parameters() if name.endswith("lora_down.a_RK")]
    assert all(0.5 < float(p.detach().std() * (3 * p.shape[1]) ** 0.5) < 1.5 for p in firsts)


def test_upcycling_draws_the_products_and_keeps_the_function() -> None:
    goal = target(kind=ExpertKind.adapters, d_ff_expert=5, first_dense=1, **LORA)
    state = dense_state()
    for name, weight in list(state.items()):
        state[f"optim.{name}.exp_avg"] = torch.ones_like(weight)
        state[f"optim.{name}.step"] = torch.tensor(3.0)
    result = upcycle(state, goal, AdaptersOptions(carry_optimizer=True), SEED)
    assert result.preserves
    made = {name: t for name, t in result.state.items() if not name.startswith("optim.")}
    model = Decoder(goal.model, goal.router, goal.experts, VOCAB).double()
    model.load_state_dict(made, strict=True)
    dense = Decoder(config(num_experts=0), TopKOptions(), experts_config("swiglu"), VOCAB).double()
    dense.load_state_dict({name: t for name, t in state.items() if not name.startswith("optim.")})
    ids_BS = tokens(2, 7)
    torch.testing.assert_close(model(ids_BS).hidden_BSD, dense(ids_BS).hidden_BSD, rtol=1e-12, atol=1e-12)
    products = {name: t for name, t in made.items() if ".lora_" in name}
    assert len(products) == 2 * 2 * 7
    for name, tensor in products.items():
        assert tensor.any() == name.endswith(".a_RK")
        assert not result.state[f"optim.{name}.exp_avg"].any()
        assert result.state[f"optim.{name}.step"] == 0
    assert result.state["optim.blocks.0.attention.w_q_QD.step"] == 3


def test_attention_and_dense_layers_count_their_products() -> None:
    plain, model = (count_parameters(adapters(**more)) for more in ({}, LORA))
    assert model.attention - plain.attention == 3 * RANK * (3 * 23 + 60 + 2 * 20 + 60 + 23)
    assert model.dense - plain.dense == 3 * RANK * 3 * (23 + 29)
    assert (model.experts, model.router) == (plain.experts, plain.router)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_rank": 0}, "model.lora_rank=0 must be 1 or more"),
        ({"lora_alpha": 3.0}, "model.lora_alpha=3.0 is over model.lora_rank, which is null"),
        ({"lora_rank": 2, "attention": "narrow"}, "would not reach model.attention=narrow"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        decoder(**changes)


@pytest.mark.real
def test_a_run_trains_the_products_alone(tmp_path: Path, training: None, capsys: Any) -> None:
    """From a dense run to PESC's: adapters, router, norms and products move, all else stays to the bit."""
    corpus, dense, moe, run = (tmp_path / name for name in ("corpus", "dense", "moe", "run"))
    tiny.write_corpus(corpus)
    assert tiny.train(corpus, dense, "model.num_experts=0", "balance=none", "train.steps=2") == 0
    parts = ("experts=adapters", "model.num_experts=4", "model.d_ff_expert=5", "model.lora_rank=2")
    text = [f"data.path={corpus}/text", f"data.cache_dir={corpus}/cache", f"data.seq_len={tiny.SEQ}"]
    said = [f"source={dense}", f"target={moe}", "method=adapters", *parts, "data=local", *text]
    assert main(["upcycle", *said, "proof_tokens=32"]) == 0
    frozen = "optim.frozen=[embed_VD,blocks.*.attention.w_*,blocks.*.feed_forward.w_*]"
    more = ["experts=adapters", frozen, "train.micro_batch_size=2", "train.global_batch_tokens=64"]
    said = [f"init_from={moe}", "data=local", *text, *more, f"run.dir={run}", "train.deterministic=true"]
    assert main(["train", *said, "train.steps=3", "checkpoint.every=2", "checkpoint.keep_last=9"]) == 0
    before, after = (open_model(path, trained_config) for path in (moe, run))
    for name in (name for name in after.weights if not name.endswith("bias_E")):
        stays = "lora" not in name and ("embed" in name or ".attention.w" in name or "feed_forward.w" in name)
        assert torch.equal(after[name], before[name]) == stays, name
    assert main(["generate", f"checkpoint={run}", "prompt=a", "max_new_tokens=3"]) == 0
    assert main(["export", f"checkpoint={run}", f"target={tmp_path / 'out'}"]) == 2
    assert "model.lora_rank=2" in capsys.readouterr().err
