"""Muon against torch.optim.Muon, matrix by matrix, and what stacks, splits and empty gradients need."""

import copy
import io
import math
import re

import pytest
import torch
from torch import nn

from moetrain.train.optim.muon import Muon, orthogonalize

# Both sides iterate in bf16; a product's kernel may differ between one matrix and a batch of them, and a
# rounding of 2^-9 in an entry grows a little over five iterations.
BF16 = {"rtol": 0.03, "atol": 0.01}


def torch_direction(update: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """What torch.optim.Muon subtracts for one [O, I] matrix, at lr 1 and without its shape factor."""
    parameter = nn.Parameter(torch.zeros_like(update))
    parameter.grad = update.clone()
    torch.optim.Muon(
        [parameter], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, ns_steps=steps
    ).step()
    return -parameter.detach() / math.sqrt(max(1.0, update.shape[0] / update.shape[1]))


def steps_of(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], grads: list[list[torch.Tensor]]
):
    for step_grads in grads:
        for parameter, grad in zip(parameters, step_grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()


def one_step(parameter: nn.Parameter, grad: torch.Tensor, **options) -> torch.Tensor:
    """The change of one step at lr 1 without weight decay, momentum or shape factor other than given."""
    before = parameter.detach().clone()
    settings = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False, **options}
    optimizer = Muon([parameter], [], **settings)
    parameter.grad = grad
    optimizer.step()
    return parameter.detach() - before


@pytest.mark.parametrize("nesterov", [True, False])
def test_several_steps_equal_torch_muon_on_matrices(nesterov):
    torch.manual_seed(0)
    shapes = [(13, 29), (31, 7), (17, 17)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    grads = [[torch.randn(shape) for shape in shapes] for _ in range(4)]
    options = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.9, "nesterov": nesterov, "ns_steps": 4}
    mine = Muon(ours, [], **options)
    reference = torch.optim.Muon(theirs, adjust_lr_fn="original", **options)
    steps_of(mine, ours, grads)
    steps_of(reference, theirs, grads)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **BF16)
        torch.testing.assert_close(mine.state[a]["momentum"], reference.state[b]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(5, 13, 29), (3, 31, 11), (1, 17, 17)])
def test_each_expert_of_a_stack_is_orthogonalised_alone(shape):
    torch.manual_seed(1)
    grad = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None, None]
    change = one_step(nn.Parameter(torch.randn(shape)), grad)
    inputs, outputs = shape[1:]
    for e in range(shape[0]):
        expected = -torch_direction(grad[e]) * math.sqrt(max(1.0, outputs / inputs))
        torch.testing.assert_close(change[e], expected, **BF16)


def test_a_stacks_experts_do_not_influence_each_other():
    torch.manual_seed(2)
    grad = torch.randn(3, 13, 29)
    other = grad.clone()
    other[1] = torch.randn(13, 29) * 100
    a, b = (
        one_step(nn.Parameter(torch.zeros(3, 13, 29)), grad),
        one_step(nn.Parameter(torch.zeros(3, 13, 29)), other),
    )
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[2], b[2])
    assert not torch.equal(a[1], b[1])


def test_gate_and_up_side_by_side_are_orthogonalised_one_by_one():
    torch.manual_seed(3)
    grad = torch.randn(3, 13, 2, 11)
    grad[:, :, 0] *= 50
    whole = one_step(nn.Parameter(torch.zeros(3, 13, 2, 11)), grad)
    for column in range(2):
        alone = one_step(nn.Parameter(torch.zeros(3, 13, 11)), grad[:, :, column].clone())
        torch.testing.assert_close(whole[:, :, column], alone, **BF16)


def test_singular_values_come_close_to_one():
    torch.manual_seed(4)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(4, 37, 23), 5).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_an_expert_without_tokens_gets_no_update():
    torch.manual_seed(6)
    grad = torch.randn(3, 13, 29)
    grad[1] = 0
    parameter = nn.Parameter(torch.randn(3, 13, 29))
    optimizer = Muon([parameter], [], lr=0.1, weight_decay=0.0)
    before = parameter.detach().clone()
    for _ in range(3):
        parameter.grad = grad.clone()
        optimizer.step()
    assert parameter.isfinite().all()
    assert torch.equal(parameter[1], before[1])
    assert not torch.equal(parameter[0], before[0])


def test_weight_decay_is_decoupled_and_skips_missing_gradients():
    parameter, skipped = nn.Parameter(torch.ones(5, 7)), nn.Parameter(torch.ones(5, 7))
    optimizer = Muon([parameter, skipped], [], lr=0.5, weight_decay=0.2)
    parameter.grad = torch.zeros(5, 7)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((5, 7), 0.9))
    assert torch.equal(skipped.detach(), torch.ones(5, 7))


def mixed(seed: int) -> tuple[list[nn.Parameter], Muon]:
    torch.manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in [(13, 7), (2, 7, 2, 5), (11, 7), (7,)]]
    matrices = [parameters[0], parameters[1]]
    groups = [
        {"params": [parameters[2]], "weight_decay": 0.1},
        {"params": [parameters[3]], "weight_decay": 0.0},
    ]
    return parameters, Muon(matrices, groups, lr=0.05, adamw_options={"lr": 0.01, "fused": True})


def test_the_rest_is_torchs_adamw_in_the_same_optimizer():
    parameters, optimizer = mixed(7)
    reference = copy.deepcopy(parameters[2:])
    adamw = torch.optim.AdamW(
        [{"params": reference[:1], "weight_decay": 0.1}, {"params": reference[1:], "weight_decay": 0.0}],
        lr=0.01,
        fused=True,
    )
    grads = [[torch.randn_like(p) for p in parameters] for _ in range(3)]
    steps_of(optimizer, parameters, grads)
    steps_of(adamw, reference, [step[2:] for step in grads])
    for ours, theirs in zip(parameters[2:], reference, strict=True):
        assert torch.equal(ours, theirs)
    assert [set(optimizer.state[p]) for p in parameters] == [{"momentum"}] * 2 + [
        {"step", "exp_avg", "exp_avg_sq"}
    ] * 2
    assert optimizer.state[parameters[1]]["momentum"].shape == (2, 7, 2, 5)


def test_a_saved_and_loaded_optimizer_continues_bit_for_bit():
    parameters, optimizer = mixed(8)
    grads = [[torch.randn_like(p) for p in parameters] for _ in range(4)]
    steps_of(optimizer, parameters, grads[:2])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies, resumed = mixed(9)
    for copied, original in zip(copies, parameters, strict=True):
        copied.data.copy_(original)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for group in (*optimizer.param_groups, *resumed.param_groups):
        group["lr"] *= 0.5  # the schedule moves on, for the groups that the load has replaced too
    steps_of(optimizer, parameters, grads[2:])
    steps_of(resumed, copies, grads[2:])
    for copied, original in zip(copies, parameters, strict=True):
        assert torch.equal(copied, original)


def test_a_closure_is_run_with_gradients_and_its_loss_returned():
    parameter = nn.Parameter(torch.randn(5, 7))
    optimizer = Muon([parameter], [])

    def closure() -> float:
        loss = parameter.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) > 0
    assert "momentum" in optimizer.state[parameter]


@pytest.mark.parametrize("shape", [(7,), (2, 3, 5, 7, 11)])
def test_what_is_not_a_matrix_is_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"not shape {shape}")):
        Muon([nn.Parameter(torch.zeros(shape))], [])
