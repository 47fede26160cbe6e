"""8-bit moments: torch's AdamW with moments rounded by the library, their bytes, and their way through fp32.

Shapes: N elements, B blocks of 256.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import decoder, tokens
from torch import Tensor, nn

from moetrain.checkpoint.state_dict import optimizer_tensors, take_optimizer_tensors
from moetrain.errors import UserError
from moetrain.ops.held import hold
from moetrain.train.optim import adamw_8bit
from moetrain.train.optim.build import build_optimizer, set_lr
from moetrain.train.optim.options import AdamW8bitConfig, AdamWConfig, OptimConfig

F = pytest.importorskip(
    "bitsandbytes.functional", reason="bitsandbytes is not installed (extra: bitsandbytes)"
)

SHAPES = {"stack": (3, 19, 23), "matrix": (37, 41), "vector": (29,)}  # 1,311, 1,517 and 29 elements
CFG = AdamW8bitConfig(lr=0.003, weight_decay=0.4, betas=(0.8, 0.95), min_8bit_size=1000)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=draw)))


def gradients(steps: int) -> list[dict[str, Tensor]]:
    """Sizes over six decades, one matrix of the stack and rows of the matrix without any."""
    draw = torch.Generator().manual_seed(5)
    found = []
    for _ in range(steps):
        grads = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
        grads["stack"] *= 10.0 ** torch.linspace(-3, 3, 19)[:, None]
        grads["stack"][1] = 0
        grads["matrix"][4:20] = 0
        found.append(grads)
    return found


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: list[dict[str, Tensor]]) -> None:
    for grads in steps:
        for name, p in model.named_parameters():
            p.grad = grads[name].clone()
        optimizer.step()


def stepped(cfg: OptimConfig, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Net()
    optimizer = build_optimizer(model, cfg)
    take_steps(model, optimizer, gradients(steps))
    return model, optimizer


def by_rounding(p: Tensor, grads: list[Tensor], decay: float, rounded: bool) -> Tensor:
    """AdamW in plain torch, whose moments go through the library's rounding after each step."""
    (beta1, beta2), eps, lr = CFG.betas, CFG.eps, CFG.lr
    p, m, v = p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        p = p * (1 - lr * decay)
        p = p - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        if rounded:
            m, v = through(m, signed=True), through(v, signed=False)
    return p


def through(moment: Tensor, signed: bool) -> Tensor:
    table = F.create_dynamic_map(signed=signed)
    codes, state = F.quantize_blockwise(moment, code=table, blocksize=256)
    found: Tensor = F.dequantize_blockwise(codes, state)
    return found


def test_an_update_is_adamws_with_moments_rounded_by_the_library() -> None:
    model, _ = stepped(CFG, 6)
    for name, start in Net().named_parameters():
        grads, large = [step[name] for step in gradients(6)], start.numel() >= CFG.min_8bit_size
        expected = by_rounding(start, grads, CFG.weight_decay if start.ndim > 1 else 0.0, large)
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=0, atol=1e-6)
        if large:  # which is another update than AdamW's
            assert (expected - by_rounding(start, grads, CFG.weight_decay, False)).abs().max() > 1e-5


def test_a_moment_of_zero_stays_small_beside_others() -> None:
    model, optimizer = stepped(CFG, 3)
    moment = optimizer_tensors(model, optimizer)["optim.matrix.exp_avg"].view(-1)
    rows = moment[4 * 41 : 20 * 41]  # without any gradient
    largest = torch.nn.functional.pad(moment, (0, -moment.numel() % 256)).view(-1, 256).abs().amax(1)
    assert (rows.abs() <= 3e-5 * largest.repeat_interleave(256)[4 * 41 : 20 * 41]).all()


def test_pieces_and_strides_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = stepped(CFG, 3)
    monkeypatch.setattr(adamw_8bit, "_PIECE", 512)
    model = Net()
    for name in ("stack", "matrix"):
        p = model.get_parameter(name)
        p.data = p.data.mT.contiguous().mT
        assert not p.is_contiguous()
    optimizer = build_optimizer(model, CFG)
    take_steps(model, optimizer, gradients(3))
    for name, p in model.named_parameters():
        assert torch.equal(p, expected.get_parameter(name)), name


def test_state_is_two_bytes_an_element_and_a_scale_for_each_256() -> None:
    (model, optimizer), (_, whole) = stepped(CFG, 1), stepped(AdamWConfig(), 1)
    for name, p in model.named_parameters():
        n, sizes = p.numel(), {key: t.nbytes for key, t in optimizer.state[p].items()}
        blocks = -(-n // 256)
        if name == "vector":
            assert sizes == {"step": 4, "exp_avg": 4 * n, "exp_avg_sq": 4 * n}
        else:
            assert sum(sizes.values()) == 2 * n + 2 * 4 * blocks
    fp32, eight = (sum(t.nbytes for s in o.state.values() for t in s.values()) for o in (whole, optimizer))
    assert (fp32, eight) == (8 * (1311 + 1517 + 29) + 12, 2 * (1311 + 1517) + 8 * (6 + 6) + 8 * 29 + 4)


def test_codes_come_back_from_fp32_to_the_bit() -> None:
    """All of them, whether the block's largest value is positive or negative; a block of zeros too."""
    signed, unsigned = adamw_8bit._checkpoint_tables(torch.device("cpu"))
    every = torch.arange(256, dtype=torch.uint8)
    for table, ends in ((signed, (0, 255)), (unsigned, (255, 255))):
        for scale in (1.0, 0.37, 3.3e-20):
            for end in ends:
                codes = torch.cat([torch.full_like(every, end), every, every[: 0 if end else 3]])
                codes[256] = end
                absmax = torch.full((-(-len(codes) // 256),), scale)
                again, absmax_again = adamw_8bit.encode(adamw_8bit.decode(codes, absmax, table), table)
                assert torch.equal(again, codes)
                assert torch.equal(absmax_again[:2], absmax[:2])
    values, absmax = (
        adamw_8bit.decode(torch.zeros(3, dtype=torch.uint8), torch.zeros(1), signed),
        torch.ones(1),
    )
    assert not values.signbit().any()
    assert torch.equal(
        adamw_8bit.decode(adamw_8bit.encode(values, signed)[0], absmax, signed), torch.zeros(3)
    )


def test_a_load_continues_to_the_bit() -> None:
    expected, _ = stepped(CFG, 5)
    model, optimizer = stepped(CFG, 2)
    saved = {name: t.clone() for name, t in optimizer_tensors(model, optimizer).items()}
    fresh = Net()
    fresh.load_state_dict(model.state_dict())
    other = build_optimizer(fresh, CFG)
    tensors = optimizer_tensors(fresh, other)
    assert all(not t.any() for t in tensors.values())
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
    take_optimizer_tensors(fresh, other, tensors)
    again = optimizer_tensors(fresh, other)
    assert all(torch.equal(again[name], t) for name, t in saved.items())
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        absmax = [t for key, t in optimizer.state[p].items() if "absmax" in key]
        assert all(map(torch.equal, absmax, [t for key, t in other.state[q].items() if "absmax" in key]))
    take_steps(fresh, other, gradients(5)[2:])
    for name, p in fresh.named_parameters():
        assert torch.equal(p, expected.get_parameter(name)), name


def test_a_checkpoint_is_adamws_near_the_same_values() -> None:
    """The same names, dtypes and shapes; it goes on under AdamW, and AdamW's under 8 bits."""
    (model, optimizer), (other, whole) = stepped(CFG, 3), stepped(AdamWConfig(), 3)
    ours, theirs = optimizer_tensors(model, optimizer), optimizer_tensors(other, whole)
    assert [(n, t.dtype, t.shape) for n, t in ours.items()] == [
        (n, t.dtype, t.shape) for n, t in theirs.items()
    ]
    for name, tensor in ours.items():
        tensor.copy_(theirs[name])
    take_optimizer_tensors(model, optimizer, ours)
    for name, taken in optimizer_tensors(model, optimizer).items():
        blocks = torch.nn.functional.pad(theirs[name].reshape(-1), (0, -theirs[name].numel() % 256))
        largest = blocks.view(-1, 256).abs().amax(1).repeat_interleave(256)[: taken.numel()]
        assert ((taken - theirs[name]).reshape(-1).abs() <= 0.011 * largest).all(), name


def test_asking_for_state_changes_no_step() -> None:
    model, (twin, twins) = Net(), stepped(CFG, 2)
    optimizer = build_optimizer(model, CFG)
    take_optimizer_tensors(model, optimizer, optimizer_tensors(model, optimizer))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), Net().parameters(), strict=True))
    take_steps(model, optimizer, gradients(2))
    wanted = optimizer_tensors(twin, twins)
    assert all(torch.equal(t, wanted[name]) for name, t in optimizer_tensors(model, optimizer).items())


def test_groups_rates_and_what_stays_whole() -> None:
    model = Net()
    hold(model.matrix)
    optimizer = build_optimizer(model, CFG)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(g["name"], g.get("bits"), [names[id(p)] for p in g["params"]]) for g in optimizer.param_groups]
    assert found == [("decay", 8, ["stack"]), ("no_decay", None, ["matrix", "vector"])]
    set_lr(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [CFG.lr / 2] * 2
    model.stack.grad = torch.ones_like(model.stack)  # the others have none
    optimizer.step()
    assert torch.equal(model.matrix, Net().matrix)
    assert not torch.equal(model.stack, Net().stack)


@pytest.mark.parametrize("least", [1, 10**6])
def test_all_or_none_may_have_eight_bits(least: int) -> None:
    model, optimizer = stepped(AdamW8bitConfig(min_8bit_size=least), 1)
    assert all(("exp_avg_codes" in optimizer.state[p]) is (least == 1) for p in model.parameters())


def losses(cfg: OptimConfig) -> list[float]:
    model = decoder(torch.float32, d_model=64, num_layers=2, d_ff_expert=64)
    optimizer, found = build_optimizer(model, cfg), []
    ids = tokens(4, 12)
    for _ in range(30):
        logits_BSV = model.logits(model(ids[:, :-1]).hidden_BSD)
        loss = nn.functional.cross_entropy(logits_BSV.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_losses_are_near_adamws() -> None:
    """From 5.80 to 0.09 nats, never further apart than 0.0077."""
    ours, theirs = losses(AdamW8bitConfig(lr=5e-4, min_8bit_size=256)), losses(AdamWConfig(lr=5e-4))
    assert theirs[-1] < 0.02 * theirs[0]
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.02
    assert ours != theirs


def test_a_device_without_an_update_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no library for it\nand more")

    monkeypatch.setattr(F, "optimizer_update_8bit_blockwise", fails)
    with pytest.raises(UserError, match=r"cannot update on cpu: no library for it: python -m bitsandbytes"):
        build_optimizer(Net(), CFG)
