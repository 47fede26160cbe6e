"""bf16 over fp32 weights: which numbers are of which dtype, on one process and sharded alike.

Shapes: B sequences, S positions, V vocabulary, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.config.hydra.compose import compose_train
from moetrain.data import Batch
from moetrain.models.decoder import Decoder
from moetrain.models.options import ModelConfig, QKNorm
from moetrain.moe.options import ExpertsConfig
from moetrain.moe.routers.topk import TopKOptions
from moetrain.parallel.apply import parallelize, sync_gradients
from moetrain.parallel.distributed import rank, world
from moetrain.parallel.mesh import Meshes, build_meshes
from moetrain.parallel.options import ParallelConfig
from moetrain.parallel.precision import round_for_inference
from moetrain.parallel.ranks import run_ranks
from moetrain.train.assemble import assemble
from moetrain.train.options import Precision
from moetrain.train.task import NextToken, TaskOutput, batch_arguments
from moetrain.verify.batches import cut, mixed

B, S, V, E = 8, 11, 29, 6
MODEL = ModelConfig(
    d_model=12, num_layers=2, num_heads=2, d_ff=10, num_experts=E, d_ff_expert=5, num_shared_experts=1,
    first_dense=1, qkv_bias=True, qk_norm=QKNorm.head, shared_gate=True, tie_embeddings=False,
)  # fmt: skip
LAYOUTS = {"one process": None, "sharded": ParallelConfig(), "ep 2": ParallelConfig(ep=2)}
NARROW, WIDE = torch.bfloat16, torch.float32


def build(layout: ParallelConfig | None, recompute: bool = False, compile: bool = False) -> NextToken:
    torch.manual_seed(3)
    decoder = Decoder(MODEL, TopKOptions(top_k=2), ExpertsConfig(), V)
    decoder.compute_dtype = NARROW
    meshes = Meshes() if layout is None else build_meshes(layout, world())
    task = NextToken(decoder)
    return parallelize(task, meshes, recompute, compile, backend="eager", compute_dtype=NARROW)


def batches(micro: int = B) -> list[Batch]:
    """This rank's, each of ``micro`` sequences."""
    return cut(mixed(B, S, V, seed=1), min(micro, B // world()), rank(), world())


def forward(task: NextToken, batch: Batch) -> TaskOutput:
    output: TaskOutput = task(**batch_arguments(batch, seed=2, step=0))
    return output


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def dtypes_seen(number: int, ranks: int, layout: ParallelConfig | None, recompute: bool) -> dict[str, Any]:
    """Of each kind of module its parameters and outputs within a forward pass; and what is left after it."""
    task = build(layout, recompute)
    seen: dict[str, set[torch.dtype]] = {}

    def of(module: nn.Module) -> set[torch.dtype]:
        return seen.setdefault(type(module).__name__.removeprefix("FSDP"), set())

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        of(module).update(p.dtype for p in module.parameters(recurse=False))

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        first = out[0] if isinstance(out, tuple) else out
        of(module).update({first.dtype} if isinstance(first, Tensor) else set())

    for module in task.model.blocks.modules():
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    output = forward(task, batches()[0])
    (output.loss_sum + sum(r.logits_TE.square().mean() for r in output.records.values())).backward()
    told = output.records.values()
    records = {t.dtype for r in told for t in (r.logits_TE, r.scores_TE, r.assignment.weights_N)}
    left = {p.dtype for p in task.parameters()} | {p.grad.dtype for p in task.parameters()}
    return {"seen": seen, "records": records, "after": left, "loss": output.loss_sum.dtype}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_dtypes_of_products_routers_losses_and_gradients(layout, recompute):
    for found in run_ranks(
        dtypes_seen, 1 if layout is None else 2, layout, recompute, init=layout is not None
    ):
        seen = found["seen"]
        for name in ("Block", "Attention", "RMSNorm", "DenseFeedForward", "MoELayer", "MLP", "Experts"):
            assert seen[name] <= {NARROW}, name
        assert seen["TopKRouter"] == found["records"] == found["after"] == {WIDE}
        assert found["loss"] is WIDE


def gradients(number: int, ranks: int, layout: ParallelConfig | None, **how: bool) -> dict[str, Tensor]:
    task = build(layout, **how)
    forward(task, batches()[0]).loss_sum.backward()
    return {name: whole(p.grad) for name, p in task.named_parameters()}


@pytest.mark.parametrize(
    "how",
    [
        {"recompute": True},
        pytest.param({"compile": True}, marks=pytest.mark.real),
        pytest.param({"recompute": True, "compile": True}, marks=pytest.mark.real),
    ],
    ids=str,
)
def test_recompute_and_compile_round_alike(how):
    plain, other = gradients(0, 1, None), gradients(0, 1, None, **how)
    for name, gradient in plain.items():
        assert torch.equal(gradient, other[name]), name


def sums(
    number: int, ranks: int, layout: ParallelConfig | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the gradients of two micro-batches together, the sum of those of each by itself)."""
    together, apart = build(layout), build(layout)
    parts = batches(B // 2 // ranks)
    assert len(parts) == 2
    total: dict[str, Tensor] = {}
    for index, part in enumerate(parts):
        sync_gradients(together, last=index == 1)
        forward(together, part).loss_sum.backward()
        sync_gradients(apart, last=True)
        forward(apart, part).loss_sum.backward()
        for name, p in apart.named_parameters():
            total[name] = total.get(name, 0.0) + whole(p.grad)
        apart.zero_grad()
    return {name: whole(p.grad) for name, p in together.named_parameters()}, total


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_gradients_are_summed_in_fp32(layout):
    """In bf16 a sum of two would err by 2^-9 of it; fp32 sums in another order by 2^-22 of their terms."""
    for found, expected in run_ranks(sums, 1 if layout is None else 2, layout, init=layout is not None):
        for name, gradient in found.items():
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=2**-20 * scale, msg=name)
            fine = gradient != gradient.bfloat16().float()
            assert fine.any() or gradient.numel() < 30, f"{name}: the sum was bf16"


def test_a_frequent_tokens_embedding_row_is_summed_in_fp32():
    """4,096 gradients of 1: a sum in bf16 stops at 256."""
    from moetrain.ops.embedding import embedding

    weight = torch.ones(3, 5, dtype=NARROW, requires_grad=True)
    ids = torch.ones(4, 1024, dtype=torch.int64)
    ids[0, 0] = 2
    embedding(ids, weight).sum().backward()
    assert weight.grad[:, 0].tolist() == [0.0, 4096.0, 1.0]


@pytest.mark.parametrize("residual", [None, WIDE])
def test_the_residual_stream(residual):
    task = build(None)
    task.model.residual_dtype = residual
    stream, inside = set(), set()
    for block in task.model.blocks:
        block.register_forward_hook(lambda module, args, out: stream.update({args[0].dtype, out[0].dtype}))
        block.attention.register_forward_hook(
            lambda module, args, out: inside.update({args[0].dtype, out.dtype})
        )
    hidden = forward(task, batches()[0]).loss_sum
    hidden.backward()
    assert stream == {residual or NARROW}
    assert inside == {NARROW}


def test_a_model_rounded_for_inference_computes_as_training():
    task, model = build(None), Decoder(MODEL, TopKOptions(top_k=2), ExpertsConfig(), V)
    model.load_state_dict(task.model.state_dict())
    round_for_inference(model, NARROW)
    assert {p.dtype for name, p in model.named_parameters() if ".router." not in name} == {NARROW}
    assert {p.dtype for name, p in model.named_parameters() if ".router." in name} == {WIDE}
    ids = mixed(B, S, V, seed=1).input_ids_BS
    with torch.no_grad():
        expected, found = task.model(ids).hidden_BSD, model(ids).hidden_BSD
    assert torch.equal(expected, found)
    assert model.logits(found).dtype is NARROW


class Plugin(nn.Module):
    """A feed-forward that knows nothing of dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 7), nn.Linear(7, 12)

    def forward(self, x: Tensor, ctx: object = None) -> tuple[Tensor, None]:
        return self.down(self.up(x).relu()), None


def plugin_gradients(number: int, ranks: int, layout: ParallelConfig | None) -> Tensor:
    torch.manual_seed(3)
    decoder = Decoder(MODEL, TopKOptions(top_k=2), ExpertsConfig(), V)
    decoder.compute_dtype = NARROW
    decoder.blocks[0].feed_forward = Plugin()
    task = NextToken(decoder)
    parallelize(task, Meshes() if layout is None else build_meshes(layout, ranks), compute_dtype=NARROW)
    forward(task, batches()[0]).loss_sum.backward()
    return whole(decoder.blocks[0].feed_forward.up.weight.grad)


def test_modules_with_ordinary_layers_need_no_casts_of_their_own():
    """Whatever a block is made of sees its parameters in bf16, on one process too."""
    one = plugin_gradients(0, 1, None)
    (shards, _) = run_ranks(plugin_gradients, 2, ParallelConfig())
    assert one.dtype is shards.dtype is WIDE
    # Each rank's gradient is rounded once more; what reaches it went through 20 roundings or so.
    assert (one - shards).norm() < 20 * 2**-9 * one.norm()


@pytest.mark.parametrize(("precision", "residual"), [("bf16", WIDE), ("fp64", None)])
def test_a_wide_stream_is_of_bf16_alone(precision, residual):
    """The proof of a layout takes a bf16 config to fp64, where an fp32 stream would be a narrow one."""
    cfg = compose_train(["model=tiny", "train.precision=bf16", "train.residual=fp32"])
    cfg = replace(cfg, train=replace(cfg.train, precision=Precision(precision)))
    assert assemble(cfg, V, "cpu", 1).task.model.residual_dtype is residual
