"""State as named tensors: the right names, the live tensors, and nothing disturbed by asking."""

import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from moetrain.checkpoint.state_dict import (
    model_tensors,
    optimizer_tensors,
    rng_state,
    set_rng_state,
)
from moetrain.errors import UserError
from moetrain.train.optim.muon import Muon


class Net(nn.Module):
    """Tied weights, a persistent and a passing buffer, and a parameter that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.block = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("bias", torch.zeros(2))
        self.register_buffer("passing", torch.zeros(2), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(ids)))


NAMES = ["embed.weight", "block.weight", "block.bias", "unused"]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    for i in range(count):
        optimizer.zero_grad()
        model(torch.tensor([i % 7, 3, 2])).square().mean().backward()
        optimizer.step()


def adamw(model: nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, **options)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    others = [model.embed.weight, model.block.bias, model.unused]
    return Muon([model.block.weight], [{"params": others, "lr": 0.01}], lr=0.02)


def test_model_tensors_are_the_live_ones_under_plain_names():
    model = Net()
    named = model_tensors(model)
    assert sorted(named) == sorted(f"model.{name}" for name in [*NAMES, "bias"])
    assert named["model.embed.weight"] is model.head.weight
    assert named["model.bias"] is model.bias


class Compiled(nn.Module):
    """Holds a module as torch.compile(module) does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


def test_wrappers_leave_no_trace_in_the_names():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    plain = list(model_tensors(model))
    model[1] = checkpoint_wrapper(model[1])
    wrapped = Compiled(model)
    assert list(model_tensors(wrapped)) == plain
    assert list(optimizer_tensors(wrapped, adamw(wrapped))) == [
        f"optim.{name.removeprefix('model.')}.{key}"
        for name in plain
        for key in ("step", "exp_avg", "exp_avg_sq")
    ]


def test_a_state_that_is_no_tensor_is_refused():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(TypeError, match="_extra_state in the model's state is a dict"):
        model_tensors(Extra(2, 2))
    model = Net()
    optimizer = adamw(model)
    optimizer_tensors(model, optimizer)
    optimizer.state[model.unused]["note"] = "text"
    with pytest.raises(TypeError, match="optimizer state note of unused is a str"):
        optimizer_tensors(model, optimizer)


def test_a_parameter_outside_the_model_is_refused():
    with pytest.raises(ValueError, match=r"parameter of shape \[11\] not in the model"):
        optimizer_tensors(Net(), torch.optim.AdamW([nn.Parameter(torch.ones(11))]))


@pytest.mark.parametrize(
    ("build", "keys"),
    [
        (adamw, ["step", "exp_avg", "exp_avg_sq"]),
        (lambda m: adamw(m, amsgrad=True), ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
        (lambda m: adamw(m, fused=True), ["step", "exp_avg", "exp_avg_sq"]),
        (lambda m: adamw(m, foreach=True), ["step", "exp_avg", "exp_avg_sq"]),
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), ["momentum_buffer"]),
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), []),
    ],
)
def test_state_that_does_not_exist_yet_is_made_without_a_trace(build, keys):
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    model.embed.weight.data[0, 0] = twin.embed.weight.data[0, 0] = -0.0
    optimizer, twin_optimizer = build(model), build(twin)
    model.block.bias.grad = torch.full((5,), 7.0)
    rng, groups = rng_state(), [dict(g) for g in optimizer.param_groups]
    named = optimizer_tensors(model, optimizer)
    assert sorted(named) == sorted(f"optim.{name}.{key}" for name in NAMES for key in keys)
    assert all((tensor == 0).all() for tensor in named.values())
    for (name, a), (_, b) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes(), name
    assert model.block.bias.grad.tolist() == [7.0] * 5
    assert model.block.weight.grad is None
    assert rng_state() == rng
    assert [dict(g) for g in optimizer.param_groups] == groups
    # and a first step from it is the first step from nothing
    step(model, optimizer)
    step(twin, twin_optimizer)
    wanted = optimizer_tensors(twin, twin_optimizer)
    for name, tensor in optimizer_tensors(model, optimizer).items():
        assert torch.equal(tensor, wanted[name]), name


def test_muon_has_state_before_its_first_step():
    model = Net()
    optimizer = muon(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    names = set(optimizer_tensors(model, optimizer))
    others = [name for name in NAMES if name != "block.weight"]
    adamw_names = {f"optim.{name}.{key}" for name in others for key in ("step", "exp_avg", "exp_avg_sq")}
    assert names == {"optim.block.weight.momentum", *adamw_names}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    step(model, optimizer)
    assert set(optimizer_tensors(model, optimizer)) == names


@pytest.mark.parametrize("build", [adamw, muon])
def test_names_do_not_depend_on_which_parameters_had_a_gradient(build):
    model = Net()
    optimizer = build(model)
    step(model, optimizer)
    assert model.unused not in optimizer.state
    fresh = Net()
    assert optimizer_tensors(model, optimizer).keys() == optimizer_tensors(fresh, build(fresh)).keys()


def draw() -> tuple:
    return (
        torch.randn(3).tolist(),
        np.random.standard_normal(3).tolist(),
        random.gauss(0, 1),
        random.random(),
        torch.randint(1000, (2,)).tolist(),
    )


def test_random_state_goes_through_json_exactly():
    torch.manual_seed(3)
    np.random.seed(4)
    random.seed(5)
    draw()  # an odd number of normal draws leaves a spare one in numpy's and Python's state
    state = json.loads(json.dumps(rng_state()))
    wanted = draw()
    draw()
    set_rng_state(state)
    assert draw() == wanted


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("numpy"),
        lambda s: s.update(torch="00"),
        lambda s: s.update(torch="zz"),
        lambda s: s.update(torch=s["torch"][:5000] + "7" * 24 + s["torch"][5024:]),  # 32 bits count
        lambda s: s["python"].update(words=s["python"]["words"][:-8]),
        lambda s: s["python"].update(version=99),
        lambda s: s["numpy"].update(generator="Other"),
    ],
)
def test_a_random_state_that_does_not_fit_is_a_user_error(change):
    state = rng_state()
    change(state)
    with pytest.raises(UserError, match="random state does not fit"):
        set_rng_state(state)
