"""``export family=moetrain``: transformers computes our model by the code that is written beside the weights.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_cases import assert_same_tensors, convert, export, refused, tensors_of, transformers
from hf_remote_cases import CASES, MIXED, YARN, batch, exported, load, random_model, routed, write_ours

from moetrain.config.init_from import spec_overrides
from moetrain.config.stored import read_spec
from moetrain.errors import UserError
from moetrain.models import cross_entropy_sum, generate
from moetrain.models.hf import FAMILIES, Fields, ModelSpec
from moetrain.models.hf.own import exported_routers
from moetrain.moe.routers import ROUTERS
from moetrain.moe.routers.topk import TopKOptions


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies foreign code before it runs it."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


# The other cases are a marked run.
ALWAYS = (
    *("topk", "topk_one", "groups", "sigmoid", "cosine", "grouped", "threshold", "relu", "expert_choice"),
    *("adaptive", "gshard", "mixed", "adapters", "full_window", "rope_yarn", "act_relu2"),
)


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_logits_and_the_loss_are_ours(name: str, tmp_path: Path) -> None:
    """A padded batch; theirs is told by a mask."""
    ours, folder = exported(CASES[name], tmp_path)
    theirs = load(folder)
    ids_BS, real_BS = batch()
    labels_BS = ids_BS.where(real_BS, -100)
    with torch.no_grad():
        hidden_BSD = ours(ids_BS).hidden_BSD
        expected_BSV = ours.logits(hidden_BSD)
        total, count = cross_entropy_sum(hidden_BSD[:, :-1], ours.head_weight, labels_BS[:, 1:])
        found = theirs(ids_BS, attention_mask=real_BS.long(), labels=labels_BS)
    scale = expected_BSV.abs().max().item()
    assert scale > 1
    assert (found.logits - expected_BSV)[real_BS].abs().max().item() <= 1e-5 * max(scale, 1)
    torch.testing.assert_close(found.loss, total / count, rtol=1e-5, atol=0)


def test_it_can_be_trained_under_autocast(tmp_path: Path) -> None:
    """Gradients are ours in fp32; under autocast the router still chooses in fp32."""
    ours, folder = exported(CASES["shared"], tmp_path)
    theirs, ids_BS = load(folder), batch()[0]
    theirs(ids_BS, labels=ids_BS).loss.backward()
    hidden_BSD = ours(ids_BS).hidden_BSD
    total, count = cross_entropy_sum(hidden_BSD[:, :-1], ours.head_weight, ids_BS[:, 1:])
    (total / count).backward()
    found = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        theirs_name = {"embed_VD": "embed_tokens.weight", "head_VD": "lm_head.weight"}.get(name, name)
        scale = parameter.grad.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(found[theirs_name].grad, parameter.grad, rtol=1e-4, atol=1e-4 * scale)
    dtypes = []
    router = theirs.blocks[0].feed_forward.router
    router.register_forward_hook(lambda module, x, weights_TE: dtypes.append(weights_TE.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = theirs(ids_BS, labels=ids_BS).loss
    loss.backward()
    assert loss.isfinite()
    assert dtypes == [torch.float32]


def test_every_router_is_a_case() -> None:
    """None is hidden by another case of the same name; the others are refused, not forgotten."""
    known = set(exported_routers())
    assert {spec.router.name for name, spec in CASES.items() if name in known} == known
    assert set(ROUTERS) >= known | {"random", "hash", "moepp", "dynmoe"}


SPECS = {
    "topk": CASES["topk"],
    "window": ModelSpec(replace(MIXED, sliding_window=5, rope_scaling=YARN), TopKOptions(top_k=3)),
    "adapters": CASES["adapters"],
    "local": CASES["local"],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.real] * (name == "local")) for name in SPECS]
)
def test_generation_is_ours(name: str, tmp_path: Path) -> None:
    """With and without the cache, alone and in a batch that is padded on the left."""
    ours, folder = exported(SPECS[name], tmp_path)
    theirs = load(folder)
    prompts = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3]]
    new = {"max_new_tokens": 11, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = [generate(ours, prompt, 11, temperature=0) for prompt in prompts]
    assert len({token for tokens in expected for token in tokens}) > 3
    for use_cache in (True, False):
        ids = torch.tensor([prompts[0]])
        found = theirs.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **new)
        assert found[0, 7:].tolist() == expected[0]
        ids = torch.tensor([prompts[0], [0] * 4 + prompts[1]])
        mask = torch.tensor([[1] * 7, [0] * 4 + [1] * 3])
        found = theirs.generate(ids, attention_mask=mask, use_cache=use_cache, **new)
        assert found[:, 7:].tolist() == expected
    seen = theirs.blocks[0].attention.seen(0, 7, 7, mask, mask.device)
    assert seen.any(-1).all()  # a softmax of nothing is not a number in older versions of torch


def test_only_who_trusts_the_code_loads_it(tmp_path: Path) -> None:
    _, folder = exported(CASES["sigmoid"], tmp_path)
    for trust in (False, None):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    assert not (tmp_path / "modules").exists()
    code = "".join(file.read_text() for file in folder.glob("*.py"))
    imported = {
        line.split()[1].split(".")[0] for line in code.splitlines() if line.startswith(("import ", "from "))
    }
    assert imported == {"__future__", "", "typing", "torch", "transformers"}


def test_auto_offers_it_and_never_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = write_ours(random_model(CASES["sigmoid"]), CASES["sigmoid"], tmp_path / "ours")
    line = refused(capsys, "export", f"checkpoint={ours}", f"target={tmp_path}/out")
    assert line.count("no family expresses this model exactly: ") == line.count("; llama: ") == 1
    assert line.endswith(
        "; family=moetrain would, by code that is written beside the weights (in transformers: "
        "trust_remote_code=True)"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (routed("random"), "router=random is not among"),
        (routed("hash"), "router=hash is not among"),
        (routed("moepp"), "router=moepp is not among"),
        (routed("dynmoe"), "router=dynmoe is not among"),
        (routed("topk", eval_capacity_factor=1.5), "router.eval_capacity_factor=1.5, and it has only None"),
    ],
    ids=lambda value: value.router.name if isinstance(value, ModelSpec) else "",
)
def test_what_it_cannot_do_is_refused_by_name(
    spec: ModelSpec, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = write_ours(random_model(spec), spec, tmp_path / "ours")
    line = refused(capsys, "export", f"checkpoint={ours}", f"target={tmp_path}/out", "family=moetrain")
    assert f"family=moetrain cannot express this model: {words}" in line
    assert words in refused(capsys, "export", f"checkpoint={ours}", f"target={tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_bf16_keeps_what_is_compared_in_fp32(tmp_path: Path) -> None:
    """As our own casts do; a bias of a rounded 0.001 would choose others."""
    ours, folder = exported(CASES["sigmoid"], tmp_path, "dtype=bf16", "max_shard_gb=1e-5")
    assert len(list(folder.glob("*.safetensors"))) > 3
    stored, config = tensors_of(folder), json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    wide = {name for name, tensor in stored.items() if tensor.dtype is not torch.bfloat16}
    assert wide == {f"blocks.{layer}.feed_forward.router.bias_E" for layer in range(3)}
    theirs, ids_BS = load(folder), batch()[0]
    assert theirs.dtype is torch.bfloat16
    assert theirs.blocks[0].feed_forward.router.bias_E.dtype is torch.float32
    with torch.no_grad():
        rounded = ours.bfloat16()
        expected = rounded.logits(rounded(ids_BS).hidden_BSD).float()
        found = theirs(ids_BS).logits.float()
    assert (found - expected).abs().mean() < 0.02 * expected.abs().max()


def test_every_config_is_read_back() -> None:
    own = FAMILIES["moetrain"]
    for name, spec in CASES.items():
        config = own.config(spec)
        assert own.config(own.read(Fields(config, name))) == config, name
    broken = own.config(CASES["topk"]) | {"router": {"name": "random"}}
    with pytest.raises(UserError, match=r"router=.*random.* is not among adaptive"):
        own.read(Fields(broken, "config.json"))


@pytest.mark.parametrize("given", [{}, {"weights_format": 3}])
def test_weights_of_another_format_are_refused(given: dict[str, int]) -> None:
    """Format 1 said nothing of it."""
    config = FAMILIES["moetrain"].config(CASES["topk"])
    config = {key: value for key, value in config.items() if key != "weights_format"} | given
    with pytest.raises(UserError, match=r"weights are in format [13], and this moetrain reads format 2"):
        FAMILIES["moetrain"].read(Fields(config, "config.json"))


@pytest.mark.real
def test_it_is_read_back(tmp_path: Path) -> None:
    """Every key and bit: by transformers, by export and by import, which do not run its code."""
    for name in ("groups", "cosine", "adapters", "rope_yarn", "full_window", "local"):
        folder = tmp_path / name
        folder.mkdir()
        _, out = exported(CASES[name], folder)
        load(out).save_pretrained(folder / "again")
        assert_same_tensors(out, folder / "again")
        assert_same_tensors(out, export(out, folder / "third", "family=moetrain"))
        ours = convert(out, folder / "imported")
        assert_same_tensors(out, export(ours, folder / "fourth", "family=moetrain"))
        first, again = read_spec(out), read_spec(folder / "again")
        assert first == again
        assert spec_overrides(first) == spec_overrides(read_spec(folder / "ours"))
