"""``moetrain upcycle`` from folders that transformers wrote: the function kept, and what is refused.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hf_cases import SHARD, write_theirs
from hf_families import FAMILIES
from hf_family import VOCAB
from torch import Tensor

from moetrain.cli import main
from moetrain.config.hydra.compose import compose_app
from moetrain.config.stored import trained_config
from moetrain.convert.open_model import open_model
from moetrain.convert.options import UpcycleConfig
from moetrain.upcycle.method import Method
from moetrain.upcycle.plan import Plan

DENSE = ("llama", "mistral_window", "qwen2", "qwen3", "gemma3_text")
EIGHT = ("model.num_experts=8", "prove=false")
D_FF = 38  # two slices of a prime width


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """By family: the same fp64 model in one file and in shards."""
    root = tmp_path_factory.mktemp("dense")
    found = {}
    for name in DENSE:
        family = FAMILIES[name]
        widened = replace(family, theirs={**family.theirs, "intermediate_size": D_FF})
        theirs = widened.their_model(torch.float64)
        files = {"single": None, "sharded": SHARD}
        found[name] = {how: write_theirs(theirs, root / name / how, size) for how, size in files.items()}
        assert len(list(found[name]["sharded"].glob("*.safetensors"))) > 5
    return found


def logits(folder: Path) -> Tensor:
    """[B, S, V] of random ids."""
    model = open_model(folder, trained_config).build()
    ids_BS = torch.randint(VOCAB, (3, 13), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model.logits(model(ids_BS).hidden_BSD)


def upcycle(source: Path, target: Path, *more: str) -> int:
    return main(["upcycle", f"source={source}", f"target={target}", *more])


def assert_kept(source: Path, target: Path) -> None:
    before_BSV, after_BSV = logits(source), logits(target)
    assert before_BSV.dtype is torch.float64
    assert before_BSV.abs().max() > 1
    torch.testing.assert_close(after_BSV, before_BSV, rtol=1e-12, atol=1e-12 * before_BSV.abs().max().item())


LAYERS = {
    "1 of 8": (1, ()),
    "2 of 8, every second layer": (2, ("model.moe_every=2",)),
    "4 of 8, the last layer": (4, ("model.first_dense=2",)),
}
# Each family but the last with one choice of layers, and each choice with one family.
DAILY = dict(zip(DENSE, [*LAYERS, next(iter(LAYERS)), ""], strict=True))


@pytest.mark.parametrize(
    ("family", "top_k", "layers"),
    [
        pytest.param(
            family, *chosen, id=f"{family}-{name}", marks=[pytest.mark.real] * (DAILY[family] != name)
        )
        for family in DENSE
        for name, chosen in LAYERS.items()
    ],
)
def test_copies_keep_the_function(
    sources: dict[str, dict[str, Path]], family: str, top_k: int, layers: tuple[str, ...], tmp_path: Path
) -> None:
    how = "sharded" if layers else "single"
    target = tmp_path / "moe"
    assert upcycle(sources[family][how], target, f"router.top_k={top_k}", *layers, *EIGHT) == 0
    assert_kept(sources[family]["single"], target)
    moe = {name for name in open_model(target, trained_config) if "experts" in name}
    assert len(moe) == {(): 6, ("model.moe_every=2",): 2, ("model.first_dense=2",): 2}[layers]


@pytest.mark.parametrize("family", [*DENSE[:4], pytest.param(DENSE[4], marks=pytest.mark.real)])
def test_slices_in_virtual_groups_keep_the_function(
    sources: dict[str, dict[str, Path]], family: str, tmp_path: Path
) -> None:
    source, target = sources[family]["sharded"], tmp_path / "moe"
    sliced = (f"model.d_ff_expert={D_FF // 2}", "router.top_k=4", *EIGHT)
    assert upcycle(source, target, "method=granular", *sliced) == 0
    assert_kept(source, target)


def test_adapters_keep_the_function(sources: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    target = tmp_path / "moe"
    wanted = ("method=adapters", "experts=adapters", "model.d_ff_expert=5", *EIGHT)
    assert upcycle(sources["qwen3"]["sharded"], target, *wanted) == 0
    assert_kept(sources["qwen3"]["single"], target)


def test_biases_of_attention_go_over_and_networks_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    biased = FAMILIES["llama_biased"]
    source = write_theirs(biased.their_model(torch.float64), tmp_path / "biased")
    said = ("model.mlp_bias=false", *EIGHT)
    assert upcycle(source, tmp_path / "moe", *said) == 2
    assert "upcycling makes experts of its dense layers, and has no biases" in capsys.readouterr().err
    attention = replace(biased, theirs={**biased.theirs, "mlp_bias": False})
    source = write_theirs(attention.their_model(torch.float64), tmp_path / "attention")
    assert upcycle(source, tmp_path / "moe", *EIGHT) == 0
    assert_kept(source, tmp_path / "moe")


def test_the_seed_decides_all(sources: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    def made(name: str, seed: int) -> dict[str, Tensor]:
        said = ("method=drop", f"train.seed={seed}", *EIGHT)
        assert upcycle(sources["qwen2"]["single"], tmp_path / name, *said) == 0
        return dict(open_model(tmp_path / name, trained_config))

    first, again, other = made("a", 0), made("b", 0), made("c", 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {n for n in first if ".experts." in n or "router.weight" in n}


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a trained dense run with its optimizer's state, its corpus)."""
    corpus = tiny.write_corpus(tmp_path_factory.mktemp("corpus"))
    run = tmp_path_factory.mktemp("dense") / "run"
    with tiny.alone():
        assert tiny.train(corpus, run, "model.num_experts=0", "balance=none", *tiny.TRAINED) == 0
    return run, corpus


def of_run(dense_run: tuple[Path, Path]) -> list[str]:
    run, corpus = dense_run
    text = [f"data.path={corpus / 'text'}", f"data.cache_dir={corpus / 'cache'}", f"data.seq_len={tiny.SEQ}"]
    return [f"source={run}", "data=local", *text, "model.num_experts=4", "proof_tokens=128"]


def test_the_proof_says_what_it_measured(
    dense_run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["upcycle", *of_run(dense_run), f"target={tmp_path / 'moe'}"]) == 0
    said = capsys.readouterr().out
    assert "method=copy keeps the function: the experts are equal" in said
    assert "source: 0.01 M parameters" in said
    assert "proof on " in said
    before, after = (float(said.split(word)[0].split()[-1]) for word in (" before", " after"))
    # Other products than the dense model's, printed to 1e-4: the last digit may be rounded up in one of them.
    assert abs(before - after) < 1.5e-4


def test_a_broken_promise_leaves_nothing(
    dense_run: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gate and up swapped, as a converter of another project had them."""
    whole = Method.experts

    def swapped(self: Any, networks: Any, plan: Plan, job: Any, layer: int) -> Any:
        made = whole(self, networks, plan, job, layer)
        return type(made)(made.w_gate_up_SDCF.flip(2), made.w_down_SFD)

    monkeypatch.setattr(Method, "experts", swapped)
    assert main(["upcycle", *of_run(dense_run), f"target={tmp_path / 'moe'}"]) == 1
    assert "was promised" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("by", ["random", "clusters", "gradients"])
def test_a_split_reads_text_where_it_needs_it(
    dense_run: tuple[Path, Path], tmp_path: Path, by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    halves = ("model.d_ff_expert=6", "router.top_k=2", "calibration_tokens=200")
    said = [*of_run(dense_run), f"target={tmp_path / 'moe'}", "method=split", f"method.by={by}", *halves]
    assert main(["upcycle", *said]) == 0
    out = capsys.readouterr().out
    assert "does not keep the function: a token sees 2 of 4 parts" in out


def test_a_split_by_gradients_has_a_preset(dense_run: tuple[Path, Path], tmp_path: Path) -> None:
    """A shared expert and one routed one a token, and router rows of equal length towards clusters."""
    parts = ("model.num_experts=3", "model.num_shared_experts=1", "model.d_ff_expert=6", "router.top_k=1")
    said = [*of_run(dense_run), f"target={tmp_path / 'moe'}", "method=llama_moe_v2", *parts]
    assert main(["upcycle", *said]) == 0
    made = open_model(tmp_path / "moe", trained_config)
    rows_ED = made["blocks.0.feed_forward.router.weight_ED"]
    torch.testing.assert_close(rows_ED.norm(dim=1), rows_ED.norm(dim=1)[:1].expand(3))
    source = open_model(dense_run[0], trained_config)["blocks.0.feed_forward.w_down_DF"]
    parts_DF = [made["blocks.0.feed_forward.shared.w_down_DF"]]
    parts_DF += [down_FD.t() for down_FD in made["blocks.0.feed_forward.experts.w_down_EFD"]]
    torch.testing.assert_close(torch.cat(parts_DF, 1).sum(1), source.sum(1))


def test_the_optimizer_goes_on(dense_run: tuple[Path, Path], tmp_path: Path, training: None) -> None:
    run, _ = dense_run
    moe = tmp_path / "moe"
    said = ["method=copy", "method.carry_optimizer=true", f"target={moe}"]
    assert main(["upcycle", *of_run(dense_run), *said]) == 0
    before, after = open_model(run, trained_config), open_model(moe, trained_config)
    up = "optim.blocks.1.feed_forward.{}.exp_avg"
    gate_FD, up_FD = before[up.format("w_gate_FD")], before[up.format("w_up_FD")]
    for expert_DCF in after[up.format("experts.w_gate_up_EDCF")]:
        assert torch.equal(expert_DCF, torch.stack([gate_FD.T, up_FD.T], 1))
    on = tmp_path / "on"
    text = [word for word in of_run(dense_run) if word.startswith("data")]
    start = [f"init_from={moe}", "init_optimizer=true", "train.steps=1", "train.global_batch_tokens=64"]
    assert main(["train", *start, *text, "train.micro_batch_size=4", f"run.dir={on}"]) == 0
    step = "optim.norm.weight_D.step"
    assert open_model(on, trained_config)[step] == before[step] + 1


@pytest.mark.parametrize(("name", "width"), [("mixlora", 24), ("pesc", 64)])
def test_an_experiment_says_what_a_dense_source_s_experts_are(
    dense_run: tuple[Path, Path], name: str, width: int
) -> None:
    """The rest is the source's; what the command line says comes last."""
    said = [*of_run(dense_run), "target=moe", f"experiment={name}"]
    own = [word for word in said if not word.startswith("model.num_experts")]
    four, eight = (compose_app(UpcycleConfig, "upcycle", words) for words in (said, own))
    assert (four.model.num_experts, eight.model.num_experts, eight.model.d_ff_expert) == (4, 8, width)
    assert eight.experts.kind.name == {"mixlora": "low_rank", "pesc": "adapters"}[name]
    assert (eight.model.d_model, eight.model.num_layers, eight.model.d_ff) == (16, 2, 24)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("model.num_experts=0",), "no layer of the target is MoE: model.num_experts=0"),
        (("model.d_ff_expert=7",), "d_ff=24 do not fit model.d_ff_expert=7"),
        (("method=grow",), "layer 0 of the source is dense, but method=grow wants an MoE one"),
        (("method=granular", "model.d_ff_expert=5"), "model.d_ff_expert=5 must divide the source's d_ff=24"),
        (("method=granular", "model.d_ff_expert=8"), "must be a multiple of d_ff / d_ff_expert"),
        (("method=adapters",), "makes experts.kind=adapters, not networks: set experts.kind=adapters"),
        (("experts.kind=low_rank", "model.lora.rank=2"), "low_rank: set experts.kind=networks, or take "),
        (
            ("method=low_rank", "experts.kind=low_rank", "model.lora.rank=2", "model.d_ff_expert=7"),
            "whole networks of d_ff=24 do not fit model.d_ff_expert=7",
        ),
        (("method.carry=1",), "method.carry"),
        (("method=copi",), "copy"),
        (("donors=[{run}]",), "method=copy reads one model, not 2"),
        (("model.num_layers=3",), "the source has 2 layers, the target model.num_layers=3"),
        (("model.d_model=32",), "32"),
        (("source=/nowhere",), "source=/nowhere does not exist"),
        (("proof_tokens=0",), "proof_tokens=0 must be 1 or more"),
        (("experts.activation=gelu",), "experts.activation"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    dense_run: tuple[Path, Path],
    more: tuple[str, ...],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = [part.format(run=dense_run[0]) for part in more]
    assert main(["upcycle", *of_run(dense_run), f"target={tmp_path / 'moe'}", *said]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert words in err
    assert list(tmp_path.iterdir()) == []
