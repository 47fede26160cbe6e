"""First weights under any layout, of Hugging Face's files or converted ones; exports of any layout's run.

The ranks of one spawn go through all layouts of their number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from largest import Largest
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.state_dict import model_tensors
from moetrain.cli import main
from moetrain.config.hydra.compose import compose_train, load_yaml
from moetrain.ops.local_part import local_part
from moetrain.parallel.ranks import run_ranks
from moetrain.plain import to_yaml
from moetrain.train.initial import load_initial
from moetrain.train.start import Built, build

FOUR = {
    "ep 4": ["parallel.ep=4"],
    "ep 2 x efsdp 2": ["parallel.ep=2"],
    "hsdp 2 x ep 2": ["parallel.dp_replicate=2", "parallel.ep=2"],
}
OPTIONS = [
    "balance=none", "model.num_experts=8", "train.micro_batch_size=1",
    f"train.global_batch_tokens={4 * tiny.SEQ}",
]  # fmt: skip
DENSE_FOUR = {"fsdp 4": [], "hsdp 2 x fsdp 2": ["parallel.dp_replicate=2"]}
_DENSE = ["model.num_experts=0", "balance=none", "model.num_kv_heads=1"]
FAMILIES = {
    "mixtral": ["router=mixtral", "model.num_kv_heads=1"],
    "gpt_oss": [
        "router=gpt_oss", "experts=gpt_oss", "router.top_k=2", "model.qkv_bias=true", "model.out_bias=true",
        "model.attention_sinks=true", "model.sliding_window=7", "model.window_pattern=[sliding,full]",
        "model.num_kv_heads=1",
    ],
    "qwen3_next": [  # some of whose tensors are made of one of theirs
        "router=qwen3", "model.attention_pattern=[gated_delta,grouped_query]", "model.attention_gate=true",
        "model.zero_centered_norms=true", "model.qk_norm=head", "model.num_shared_experts=1",
        "model.shared_gate=true", "model.gated_delta={num_key_heads: 2, num_value_heads: 4}",
        "model.gated_delta.key_head_dim=5", "model.gated_delta.value_head_dim=3", "model.num_kv_heads=1",
    ],
    "glm4_moe": [  # some layers dense, a bias of the choice
        "router=sigmoid", "model.first_dense=1", "model.num_shared_experts=1", "model.qk_norm=head",
        "model.rope_fraction=0.5", "model.qkv_bias=true", "model.num_kv_heads=1",
    ],
    "granitemoeshared": [  # experts in stacks
        "router=mixtral", "model.num_shared_experts=1", "model.d_ff_shared=24", "model.scales.residual=0.4",
        "model.scales.attention=0.3", "model.num_kv_heads=1",
    ],
    "deepseek_v3": [  # whose bias has moved
        "router=deepseek_v3", "router.top_k=3", "router.num_groups=4", "router.top_groups=2",
        "balance=aux_free", "model.attention=latent", "model.latent.q_lora_rank=7",
        "model.latent.kv_lora_rank=5", "model.latent.qk_nope_head_dim=3", "model.latent.qk_rope_head_dim=4",
        "model.latent.v_head_dim=6", "model.rope_interleaved=true", "model.num_shared_experts=1",
        "model.first_dense=1",
    ],
    "minimax_m2": [
        "router=sigmoid", "router.route_scale=1", "balance=aux_free", "model.qk_norm=full",
        "model.rope_fraction=0.5",
        "model.num_kv_heads=1",
    ],
    "dots1": [
        "router=sigmoid", "router.num_groups=4", "router.top_groups=2", "balance=aux_free",
        "model.first_dense=1", "model.num_shared_experts=1", "model.qk_norm=head", "model.qkv_bias=true",
        "model.out_bias=true", "model.num_kv_heads=1",
    ],
    "ernie4_5_moe": [
        "router=qwen3", "model.first_dense=1", "model.num_shared_experts=1", "model.rope_interleaved=true",
        "model.num_kv_heads=1",
    ],
    "hunyuan_v1_moe": [
        "router=qwen3", "model.num_shared_experts=1", "model.qk_norm=head_after_rope", "model.qkv_bias=true",
        "model.out_bias=true", "model.num_kv_heads=1",
    ],
    "llama": [*_DENSE, "model.qkv_bias=true", "model.out_bias=true", "model.mlp_bias=true"],
    "gemma3_text": [
        *_DENSE, "experts=geglu_tanh", "model.qk_norm=head", "model.sliding_window=7",
        "model.window_pattern=[sliding,full]", "model.window_rope_theta=70", "model.zero_centered_norms=true",
        "model.sandwich_norms=true", "model.scales.embedding=4", "model.scales.round_embedding=true",
    ],
}  # fmt: skip
DENSE = ("llama", "gemma3_text")


_BY_HAND = (
    *("glm4_moe", "granitemoeshared", "minimax_m2", "dots1", "ernie4_5_moe", "hunyuan_v1_moe", "llama"),
)
_SLOW = [
    pytest.param(name, marks=pytest.mark.slow if name in _BY_HAND else pytest.mark.real)
    for name in FAMILIES
    if name != "mixtral"
]


@pytest.fixture(scope="module", params=["mixtral", *_SLOW])
def folders(
    request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The same weights in Hugging Face's files, which are those of a run, and converted from these again."""
    options = [*OPTIONS, *FAMILIES[request.param]]
    made = tmp_path_factory.mktemp("folders")
    run, hf, converted = (made / name for name in ("run", "hf", "converted"))
    with tiny.alone():
        assert tiny.train(corpus, run, *options, "train.steps=1", "model.init_std=0.3") == 0
        assert main(["export", f"checkpoint={run}", f"target={hf}", "max_shard_gb=8e-6"]) == 0
        assert main(["convert", f"source={hf}", f"target={converted}"]) == 0
    assert len(list(hf.glob("*.safetensors"))) > 2
    assert json.loads((hf / "config.json").read_text())["model_type"] == request.param
    return {path.name: str(path) for path in (hf, converted)}


def arguments(corpus: Path, start: str) -> list[str]:
    """Of a run that starts from ``start``, which alone says what the model is."""
    given = tiny.command(corpus, Path("unused"), *OPTIONS, "balance=none")[1:]
    own = [a for a in given if not a.startswith(("run.dir", "model.", "router", "data.tokenizer"))]
    return [*own, f"init_from={start}"]


def whole(built: Built) -> dict[str, Tensor]:
    """The model's tensors, gathered, and copied."""
    tensors = {name: t.detach() for name, t in model_tensors(built.state.task.model).items()}
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in tensors.items()}


def loaded(arguments: list[str], starts: list[str]) -> tuple[list[dict[str, Tensor]], Built, Any]:
    """What each folder in ``starts`` gives to a model of this layout."""
    cfg = compose_train(arguments)
    built = build(cfg, "cpu")
    found = []
    for start in starts:
        with torch.no_grad():
            for tensor in model_tensors(built.state.task.model).values():
                tensor.fill_(torch.nan)
        load_initial(
            Path(start), model_tensors(built.state.task.model), {}, built.corpus.tokenizer, load_yaml
        )
        found.append(whole(built))
    return found, built, cfg


def save(built: Built, cfg: Any, run: Path, rank: int = 0) -> None:
    """A run folder with one checkpoint, as far as an export needs it."""
    checkpointer = Checkpointer(run / "checkpoints")
    built.state.save(checkpointer)
    checkpointer.close()
    if rank == 0:
        (run / "config.yaml").write_text(to_yaml(cfg))
        built.corpus.tokenizer.save(run / "tokenizer")


def on_four(
    rank: int, world: int, arguments: list[str], starts: list[str], run: str, layouts: dict[str, list[str]]
) -> dict[str, Any]:
    """Every layout's weights; the first layout then trains a step and leaves a run folder."""
    found: dict[str, Any] = {}
    for layout, parallel in layouts.items():
        first = not found
        found[layout], built, cfg = loaded([*arguments, *parallel], starts)
        if first:
            built.step.run(0, built.state.loader.next_step())
            built.state.step += 1
            save(built, cfg, Path(run), rank)
        built.state.loader.close()
    return found if rank == 0 else {}


def largest(rank: int, world: int, arguments: list[str], start: str) -> tuple[int, int]:
    """The largest tensor made while a model starts from a folder, and the largest shard; in elements."""
    built = build(compose_train(arguments), "cpu", drawn=False)
    tensors = model_tensors(built.state.task.model)
    with Largest() as seen:
        tensors = model_tensors(built.state.task.model)
        load_initial(Path(start), tensors, {}, built.corpus.tokenizer, load_yaml)
    built.state.loader.close()
    return seen.numel, max(local_part(t).numel() for t in tensors.values())


def is_dense(folders: dict[str, str]) -> bool:
    return json.loads((Path(folders["hf"]) / "config.json").read_text())["model_type"] in DENSE


@pytest.mark.parametrize("ep", [1, 2])
def test_no_rank_reads_more_than_its_shards(folders: dict[str, str], corpus: Path, ep: int) -> None:
    if ep > 1 and is_dense(folders):
        pytest.skip("it has no experts")
    given = [*arguments(corpus, folders["hf"]), f"parallel.ep={ep}"]
    for made, held in run_ranks(largest, 2, given, folders["hf"]):
        assert 0 < made <= held


@pytest.mark.real
def test_every_layout_starts_alike_and_exports_alike(
    folders: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    given, starts = arguments(corpus, folders["hf"]), list(folders.values())
    with tiny.alone():
        alone, built, cfg = loaded(given, starts)
    for tensors in alone:
        assert not any(t.isnan().any() for t in tensors.values())
        assert_same(tensors, alone[0])
    layouts = DENSE_FOUR if is_dense(folders) else FOUR
    four = run_ranks(on_four, 4, given, starts, str(tmp_path / "ep4"), layouts, timeout=120)[0]
    for layout, found in four.items():
        for tensors in found:
            assert tensors.keys() == alone[0].keys(), layout
            assert_same(tensors, alone[0])

    checkpointer = Checkpointer(tmp_path / "ep4" / "checkpoints")
    path = checkpointer.latest_valid()
    assert path is not None
    built.state.load(checkpointer, path)
    save(built, cfg, tmp_path / "one")
    built.state.loader.close()
    shards = [len(list(run.glob("checkpoints/*/*.distcp"))) for run in (tmp_path / "ep4", tmp_path / "one")]
    assert shards == [4, 1]
    exported = []
    for name in ("ep4", "one"):
        assert main(["export", f"checkpoint={tmp_path / name}", f"target={tmp_path}/out_{name}"]) == 0
        exported.append(load_file(tmp_path / f"out_{name}" / "model.safetensors"))
    assert_same(*exported)
    (before,) = {k: v for k, v in alone[0].items() if k == "model.embed_VD"}.values()
    assert not torch.equal(exported[0]["model.embed_tokens.weight"], before)  # the step was taken


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []
