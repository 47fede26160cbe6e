"""One second moment a row: element by element in plain Python, AdamW where the two agree, and its state.

Shapes: N rows, D width.
"""

from __future__ import annotations

import math

import pytest
import torch
from layer_cases import layer_decoder
from model_cases import decoder, tokens
from torch import Tensor, nn

from moetrain.checkpoint.state_dict import optimizer_tensors
from moetrain.errors import UserError
from moetrain.train.optim.build import build_optimizer, group_parameters, set_lr
from moetrain.train.optim.options import AdamWConfig, MuonConfig, OptimConfig, Tables
from moetrain.train.optim.row_wise import RowWise, mean_squares

N, D = 7, 5
BY_ROW = [Tables.row_adam, Tables.row_adagrad]


def gradients(steps: int) -> list[Tensor]:
    """Rows of very different size, one of them never looked up, another one once."""
    torch.manual_seed(5)
    drawn = [
        torch.randn(N, D, dtype=torch.float64) * 10.0 ** torch.arange(-3.0, 4.0)[:, None]
        for _ in range(steps)
    ]
    for step, grad in enumerate(drawn):
        grad[2] = 0
        if step != 1:
            grad[4] = 0
    return drawn


def by_hand(start: Tensor, grads: list[Tensor], momentum: bool, lr: float, decay: float) -> Tensor:
    beta1, beta2, eps = 0.9, 0.95, 1e-8
    rows = [row.tolist() for row in start]
    for n, row in enumerate(rows):
        mean, square = [0.0] * D, 0.0
        for t, grad in enumerate(grads, 1):
            g = grad[n].tolist()
            mean_square = sum(x * x for x in g) / D
            square = beta2 * square + (1 - beta2) * mean_square if momentum else square + mean_square
            for d in range(D):
                row[d] -= lr * decay * row[d]
                mean[d] = beta1 * mean[d] + (1 - beta1) * g[d]
                if momentum:
                    spread = math.sqrt(square / (1 - beta2**t)) + eps
                    row[d] -= lr * mean[d] / (1 - beta1**t) / spread
                else:
                    row[d] -= lr * g[d] / (math.sqrt(square) + eps)
    return torch.tensor(rows, dtype=torch.float64)


def stepped(start: Tensor, grads: list[Tensor], momentum: bool, decay: float) -> tuple[Tensor, RowWise]:
    table = nn.Parameter(start.clone())
    optimizer = RowWise(None, [table], 0.03, decay, (0.9, 0.95), 1e-8, momentum)
    for grad in grads:
        table.grad = grad.clone()
        optimizer.step()
    return table.detach(), optimizer


@pytest.mark.parametrize("decay", [0.0, 0.4])
@pytest.mark.parametrize("momentum", [True, False])
def test_an_update_is_that_of_the_formula(momentum: bool, decay: float) -> None:
    start, grads = torch.randn(N, D, dtype=torch.float64), gradients(4)
    ours, _ = stepped(start, grads, momentum, decay)
    torch.testing.assert_close(ours, by_hand(start, grads, momentum, 0.03, decay), rtol=1e-12, atol=1e-12)
    if not decay:
        assert torch.equal(ours[2], start[2])  # never looked up


def test_rows_of_one_size_are_adamw() -> None:
    """Where all squares of a row are equal, their mean is each of them."""
    start, table = torch.randn(N, D, dtype=torch.float64), None
    grads = [grad.sign() * grad[:, :1].abs() for grad in gradients(5)]
    table = nn.Parameter(start.clone())
    reference = torch.optim.AdamW([table], lr=0.03, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for grad in grads:
        table.grad = grad.clone()
        reference.step()
    ours, _ = stepped(start, grads, momentum=True, decay=0.1)
    torch.testing.assert_close(ours, table.detach(), rtol=1e-12, atol=1e-12)


def test_adagrad_of_one_column_is_torchs() -> None:
    start, grads = torch.randn(N, 1, dtype=torch.float64), [grad[:, :1] for grad in gradients(4)]
    table = nn.Parameter(start.clone())
    reference = torch.optim.Adagrad([table], lr=0.03, eps=1e-8)
    for grad in grads:
        table.grad = grad.clone()
        reference.step()
    ours, _ = stepped(start, grads, momentum=False, decay=0.0)
    torch.testing.assert_close(ours, table.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cfg", [AdamWConfig, MuonConfig])
@pytest.mark.parametrize("tables", BY_ROW)
def test_state_is_one_number_a_row_and_the_rest_is_as_before(tables: Tables, cfg: type[OptimConfig]) -> None:
    models = [layer_decoder("peer").float() for _ in range(2)]
    kinds = (tables, Tables.elementwise)
    optimizers = [build_optimizer(m, cfg(tables=kind)) for m, kind in zip(models, kinds, strict=True)]
    for _ in range(2):
        models[0](tokens(2, 7)).hidden_BSD.square().sum().backward()
        for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert ours.grad is not None
            theirs.grad = ours.grad.clone()  # the same, so that all but tables move alike
        for optimizer in optimizers:
            set_lr(optimizer, 0.5)
            optimizer.step()
            optimizer.zero_grad()
    shapes = {key: tuple(t.shape) for key, t in optimizer_tensors(models[0], optimizers[0]).items()}
    at = "optim.blocks.1.feed_forward.experts.w_up_ND"
    assert shapes[f"{at}.row_square"] == (49, 1)
    assert (f"{at}.exp_avg" in shapes) is (tables is Tables.row_adam)
    assert f"{at}.exp_avg_sq" not in shapes
    assert not any("row_square" in key for key in shapes if ".experts." not in key)
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs) is (".experts." not in name), name


@pytest.mark.parametrize("tables", BY_ROW)
def test_a_load_continues_to_the_bit(tables: Tables) -> None:
    start, grads = torch.randn(N, D, dtype=torch.float64), gradients(4)
    momentum = tables is Tables.row_adam
    whole, _ = stepped(start, grads, momentum, 0.1)
    half, first = stepped(start, grads[:2], momentum, 0.1)
    table = nn.Parameter(half.clone())
    second = RowWise(None, [table], 0.03, 0.1, (0.9, 0.95), 1e-8, momentum)
    second.load_state_dict(first.state_dict())
    for grad in grads[2:]:
        table.grad = grad.clone()
        second.step()
    assert torch.equal(table, whole)


def test_muon_takes_no_tables() -> None:
    groups = group_parameters(layer_decoder("peer"), muon=True, tables=True)
    assert {name.rpartition(".")[2] for name, _ in groups["tables"]} == {"w_up_ND", "w_down_ND"}
    assert not any("_ND" in name for name, _ in groups["muon"])
    assert any("_ND" in name for name, _ in group_parameters(layer_decoder("peer"), muon=True)["decay"])


def test_a_model_without_tables_has_no_rows_to_keep() -> None:
    with pytest.raises(UserError, match=r"optim\.tables=row_adam is of tables whose rows are looked up"):
        build_optimizer(decoder(), AdamWConfig(tables=Tables.row_adam))
    with pytest.raises(ValueError, match=r"rows and columns, not shape \(3,\)"):
        RowWise(None, [nn.Parameter(torch.ones(3))], 0.1, 0.0, (0.9, 0.95), 1e-8, True)


def test_a_mean_square_is_of_the_whole_row() -> None:
    grad = torch.randn(3, 4)
    torch.testing.assert_close(mean_squares(grad)[:, 0], torch.stack([row @ row / 4 for row in grad]))
