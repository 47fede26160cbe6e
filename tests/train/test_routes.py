"""Records of routes: what is written and looked up, and what does not fit.

Shapes: B sequences, S positions, K experts a token, E experts.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from router_cases import normal
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetrain.errors import UserError
from moetrain.moe import Router, RouterContext, build_router
from moetrain.train.routes import RouteReader, RouteWriter, replay_refusal

B, S, K, E, D = 3, 5, 2, 7, 4


def routers(experts: int = E, top_k: int = K, layers: tuple[int, ...] = (1, 3)) -> dict[int, Router]:
    torch.manual_seed(0)
    return {n: build_router("topk", d_model=D, num_experts=experts, top_k=top_k).double() for n in layers}


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Sample ids, tokens, validity: one sequence is padded at its end, one is nothing but padding."""
    tokens_BS = torch.randint(0, 50, (B, S), generator=torch.Generator().manual_seed(seed))
    valid_BS = torch.tensor([[True] * S, [True] * 3 + [False] * 2, [False] * S])
    return torch.tensor([40, 7, 12]) + 100 * seed, tokens_BS, valid_BS


def record(folder: Path, *seeds: int) -> dict[int, dict[int, Tensor]]:
    """Write a file a seed; seed -> layer -> the experts [B S, K], by the routers themselves."""
    writer, found = RouteWriter(folder, routers()), {}
    for seed in seeds:
        samples_B, tokens_BS, valid_BS = batch(seed)
        ctx = RouterContext(B, S, samples_B, tokens_BS.view(-1), valid_BS.view(-1))
        xs = {n: normal(10 * seed + n, B * S, D) for n in (1, 3)}
        records = {n: router(xs[n], ctx) for n, router in routers().items()}
        writer.add(samples_B, tokens_BS, valid_BS, records)
        writer.flush(f"step_{seed}")
        found[seed] = {n: router.logits(xs[n]).topk(K).indices for n, router in routers().items()}
    return found


def test_what_was_recorded_is_looked_up_by_sample_and_position(tmp_path: Path) -> None:
    right = record(tmp_path, 0, 1)
    reader = RouteReader(tmp_path, routers())
    for seed in (1, 0):
        samples_B, tokens_BS, valid_BS = batch(seed)
        order = torch.tensor([2, 0, 1])  # another order of sequences, and one that has less of them
        found = reader.forced(samples_B[order], tokens_BS[order, :4], valid_BS[order, :4])
        for n in (1, 3):
            right_BSK = right[seed][n].view(B, S, K)[order, :4]
            assert torch.equal(found[n].view(B, 4, K)[valid_BS[order, :4]], right_BSK[valid_BS[order, :4]])
            assert found[n].dtype == torch.int64


def test_a_record_is_two_kinds_of_file_and_no_code(tmp_path: Path) -> None:
    record(tmp_path, 0)
    described = json.loads((tmp_path / "routes.json").read_text())
    assert described == {"format": 1, "layers": {n: {"experts": E, "top_k": K} for n in ("1", "3")}}
    rows = load_file(tmp_path / "step_0.safetensors")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in rows.items()} == {
        "samples": (torch.int64, (B,)),
        "tokens": (torch.int32, (B, S)),
        "valid": (torch.bool, (B, S)),
        "experts.1": (torch.int32, (B, S, K)),
        "experts.3": (torch.int32, (B, S, K)),
    }
    assert bool((rows["experts.1"][1, 3:] == -1).all())


@pytest.mark.parametrize(
    ("others", "line"),
    [
        (routers(experts=8), "layer 1 was 2 of 7 experts a token, and is 2 of 8 experts a token here"),
        (routers(top_k=3), "layer 1 was 2 of 7 experts a token, and is 3 of 7 experts a token here"),
        (routers(layers=(1, 2)), "is of routers in layers 1, 3, and the model has them in layers 1, 2"),
    ],
)
def test_other_layers_are_refused(tmp_path: Path, others: dict[int, Router], line: str) -> None:
    record(tmp_path, 0)
    with pytest.raises(UserError, match=rf"^replay\.force={tmp_path}.*{line}"):
        RouteReader(tmp_path, others)
    with pytest.raises(UserError, match=rf"^replay\.record={tmp_path}.*{line}"):
        RouteWriter(tmp_path, others)


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    record(tmp_path, 0)
    reader = RouteReader(tmp_path, routers())
    samples_B, tokens_BS, valid_BS = batch()
    other_BS = tokens_BS.clone()
    other_BS[1, 2] = 51
    line = rf"sample 7 had token {int(tokens_BS[1, 2])} at position 2, and has 51 now"
    with pytest.raises(UserError, match=line):
        reader.forced(samples_B, other_BS, valid_BS)
    reader.forced(samples_B, other_BS, valid_BS & (torch.arange(S) < 2))  # in padding it may be anything
    with pytest.raises(UserError, match="sample 7 was not recorded at position 3"):
        reader.forced(samples_B, tokens_BS)
    longer_BS = torch.cat([tokens_BS, tokens_BS], 1)
    with pytest.raises(UserError, match="sample 40 was not recorded at position 5"):
        reader.forced(samples_B[:1], longer_BS[:1])
    with pytest.raises(UserError, match=r"sample 8 was not recorded \(of 3 samples\)"):
        reader.forced(torch.tensor([8]), tokens_BS[:1])


def test_a_sample_that_is_recorded_twice_is_refused(tmp_path: Path) -> None:
    record(tmp_path, 0)
    (tmp_path / "again.safetensors").write_bytes((tmp_path / "step_0.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"sample 40 is in again\.safetensors and step_0\.safetensors"):
        RouteReader(tmp_path, routers())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"experts.1": torch.full((B, S, K), E, dtype=torch.int32)}, r"a token without 2 experts of 7"),
        ({"experts.3": torch.full((B, S, K), 3, dtype=torch.int32)}, r"experts\.3 has a token without 2"),
        ({"experts.3": torch.zeros(B, S, 1, dtype=torch.int32)}, r"experts\.3 is torch.int32 \[3, 5, 1\]"),
        ({"tokens": torch.zeros(B, S)}, "do not fit one another"),
        ({"valid": torch.ones(B, 2, dtype=torch.bool)}, "do not fit one another"),
    ],
)
def test_files_that_hold_something_else_are_refused(
    tmp_path: Path, change: dict[str, Tensor], line: str
) -> None:
    record(tmp_path, 0)
    path = tmp_path / "step_0.safetensors"
    save_file(load_file(path) | change, path)
    samples_B, tokens_BS, valid_BS = batch()
    with pytest.raises(UserError, match=line):
        RouteReader(tmp_path, routers()).forced(samples_B, tokens_BS, valid_BS)


def test_files_that_are_no_record_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no record of routes: there is no .*routes\.json"):
        RouteReader(tmp_path, routers())
    record(tmp_path, 0)
    (tmp_path / "more.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(UserError, match=r"more\.safetensors cannot be read as a record of routes"):
        RouteReader(tmp_path, routers())
    described = json.loads((tmp_path / "routes.json").read_text())
    (tmp_path / "routes.json").write_text(json.dumps(described | {"format": 2}))
    with pytest.raises(UserError, match="format 2, and this version reads format 1"):
        RouteReader(tmp_path, routers())


def test_routers_that_cannot_be_told_are_refused() -> None:
    relu = build_router("relu", d_model=D, num_experts=E)
    assert "router=relu cannot be told which experts to take" in str(replay_refusal({0: relu}))
    tight = build_router("topk", d_model=D, num_experts=E, capacity_factor=1.0)
    assert "a capacity or rounding takes some away" in str(replay_refusal({0: tight}))
    assert "the model has no router" in str(replay_refusal({}))
    assert replay_refusal(routers()) is None


def test_one_forced_layer_has_its_own_experts() -> None:
    """A context hands each layer the experts of its place."""
    ids = {n: torch.full((B * S, K), n) for n in (1, 3)}
    ctx = replace(RouterContext.default(B, S), forced=ids)
    assert ctx.at_layer(3, None).forced_TK is ids[3]
    assert RouterContext.default(B, S).forced_TK is None
