"""What a training step waits for on an accelerator: the list, and that the counter sees every kind of wait.

The step runs on the pretended device of ``benchmarks/pretended_device.py``, on batches of one document a row
and without padding.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import device_waits
from pretended_device import DEVICE, copies_of, pretended_device, waits_of

from moetrain.config.hydra.compose import compose_train
from moetrain.data.batch import Batch
from moetrain.ops.transfer import to_device
from moetrain.train.assemble import Assembled, assemble

MICRO_BATCHES, COPIED = 2, 3  # tokens, labels and sample numbers
# Waits a pass of a MoE layer, where it is not one.
SMALLER = ["model.num_layers=2", "model.first_dense=0", "train.global_batch_tokens=26"]  # a pass a layer
MORE = {"base": 2, "gshard": 2, "emo": 2}
OWN = {
    "dynmoe": 2,
    "dynmoe_deepspeed": 2,
    "competesmoe_v1": 3,
}  # waits a step besides: each layer's router looks whether experts come or go; all are asked in rounds


@cache
def found(*overrides: str) -> device_waits.Found:
    return device_waits.count(compose_train([*device_waits.SMALL, "balance=none", *overrides]))


def places(counted: device_waits.Found) -> Counter[tuple[str, str]]:
    """Waits by (file, function)."""
    waits: Counter[tuple[str, str]] = Counter()
    for site, times in counted.sites.items():
        if site.wait:
            waits[site.place.split(":")[0], site.function.split(".")[-1]] += times
    return waits


def test_the_list():
    """One wait a layer and pass in fp32, and two a step: whether to update, and whether the update broke a
    weight."""
    counted = found()
    assert counted.passes == 2 * MICRO_BATCHES
    assert places(counted) == {
        ("moe/assignment.py", "counts_on_host"): counted.passes,
        ("train/step.py", "_on_host"): 1,
        ("train/step.py", "_broken_weights"): 1,
    }


@pytest.mark.parametrize("overrides", [(), ("router.score=sigmoid",)], ids=str)
def test_no_wait_a_layer_in_bf16(overrides):
    """Where grouped products compute, which take their counts on the device: two waits a step."""
    counted = found("train.precision=bf16", "model.d_model=16", "model.d_ff_expert=16", *overrides)
    assert counted.passes == 2 * MICRO_BATCHES
    assert places(counted) == {("train/step.py", "_on_host"): 1, ("train/step.py", "_broken_weights"): 1}


@pytest.mark.parametrize(
    ("overrides", "passes", "copies"),
    [
        (["balance=switch"], 8, 0),  # a forward of each micro-batch before the first backward
        (["balance=running"], 4, 1),  # the running share
        (["balance=aux_free"], 4, 1),  # which way each bias goes
        (["router=relu", "balance=remoe", "model.num_experts=3"], 8, 0),
        (["optim=muon", "train.recompute=true"], 8, 0),
        (["router.capacity_factor=1.0", "balance=importance_load"], 8, 0),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else None,
)
def test_losses_controllers_and_recompute_add_no_wait(overrides, passes, copies):
    counted = found(*overrides)
    assert counted.passes == passes
    assert counted.waits == passes + 2, counted.sites
    assert counted.copies == MICRO_BATCHES * COPIED + copies
    assert not any(site.wait for site in counted.sites if site.to_device)


PRESETS = sorted(path.stem for path in device_waits.PRESETS.glob("*.yaml"))
OF_EACH_KIND = ("topk", "expert_choice", "relu", "base", "dynmoe")


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=[pytest.mark.real] * (name not in OF_EACH_KIND)) for name in PRESETS]
)
def test_routers(preset):
    """Each preset of a router, by rounds where it begins with many experts; solvers look after iterations."""
    experts = 16 if preset in ("deepseek_v3", "relu") else 8  # ReLU: enough to begin in rounds
    counted = found(f"router={preset}", f"model.num_experts={experts}", *SMALLER)
    if preset in ("sinkhorn", "scot"):
        assert counted.waits > counted.passes + 2
    elif preset in ("relu", "gw", "comet", "dselect_k", "evomoe"):  # by rounds
        assert counted.waits == 3 * counted.passes + 2
    else:
        assert counted.waits == MORE.get(preset, 1) * counted.passes + 2 + OWN.get(preset, 0), counted.sites


def test_a_wait_that_is_added_is_found():
    """Also in a backward pass, and told by its place."""

    def look(made: Assembled) -> None:
        made.task.model.norm.register_forward_hook(
            lambda module, args, y_BSD: float(y_BSD.detach().sum()) and None
        )
        made.task.model.norm.weight_D.register_hook(lambda grad_D: bool(grad_D.any()) and None)

    cfg = compose_train([*device_waits.SMALL, "balance=none"])
    counted = device_waits.count(cfg, look)
    assert counted.waits == found().waits + 2 * MICRO_BATCHES


def test_the_pretended_step_is_the_step():
    cfg = compose_train([*device_waits.SMALL, "balance=none"])
    step = assemble(cfg, device_waits.VOCAB, "cpu", 1).step
    losses = [step.run(i, device_waits.random_batches(cfg, i)).loss for i in range(device_waits.STEPS)]
    assert found().loss == pytest.approx(losses[-1], rel=1e-5)


KINDS = {
    "item": (lambda x: x.sum().item(), 1, 0),
    "float": (lambda x: float(x[0]), 1, 0),
    "if": (lambda x: bool((x > 1).any()), 1, 0),
    "tolist": (lambda x: x.tolist(), 1, 0),
    "cpu": (lambda x: x.cpu(), 1, 0),
    "to": (lambda x: x.to("cpu", torch.float64), 1, 0),
    "read into": (lambda x: torch.zeros(5).copy_(x), 1, 0),
    "nonzero": (lambda x: x.nonzero(), 1, 0),
    "mask": (lambda x: x[x > 1], 1, 0),
    "set by mask": (lambda x: x.clone().index_put_((x > 1,), x.new_zeros(())), 1, 0),
    "masked_select": (lambda x: x.masked_select(x > 1), 1, 0),
    "unique": (lambda x: x.unique(), 1, 0),
    "bincount": (lambda x: x.long().bincount(minlength=9), 2, 0),
    "repeat": (lambda x: x.repeat_interleave(x.long()), 1, 0),
    "equal": (lambda x: torch.equal(x, x + 1), 1, 0),
    "fill by a tensor": (lambda x: x.masked_fill(x > 1, x.sum()), 1, 0),
    "a list": (lambda x: torch.tensor([1, 2], device=x.device), 1, 1),
    "a list as index": (lambda x: x[[0, 1]], 1, 1),
    "a host index": (lambda x: x[torch.tensor([0, 1])], 1, 1),
    "a host tensor": (lambda x: torch.ones(5).to(x.device, non_blocking=True), 1, 1),
    "write into": (lambda x: x.clone().copy_(torch.zeros(5)), 1, 1),
    "products": (lambda x: products(x), 1, 0),
    "pinned": (lambda x: to_device(torch.ones(5), x.device), 0, 1),
    "pinned, waited for": (lambda x: torch.ones(5).pin_memory().to(x.device), 1, 1),
    "none": (lambda x: (x * 2 + torch.full((5,), 3.0, device=x.device)).sort()[0].where(x > 1, 0), 0, 0),
    "repeat, known": (lambda x: x.repeat_interleave(x.long(), output_size=10), 0, 0),
}  # fmt: skip


def products(x: Tensor) -> Tensor:
    ends = torch.full((1,), 5, dtype=torch.int32, device=x.device)
    wide = x[:, None].expand(5, 8).contiguous()
    return torch.nn.functional.grouped_mm(wide, wide.new_ones(1, 8, 8), offs=ends)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_wait_is_seen(kind):
    act, waits, copies = KINDS[kind]
    with pretended_device() as pretence:
        x = torch.arange(5.0, device=DEVICE)
        assert not pretence.sites
        act(x)
        assert (waits_of(pretence.sites), copies_of(pretence.sites)) == (waits, copies)


def test_host_and_device_tensors_do_not_mix():
    with pretended_device():
        x = torch.ones(5, device=DEVICE)
        assert (x + torch.tensor(2.0)).device == DEVICE  # a number
        with pytest.raises(RuntimeError, match="a tensor on the host"):
            x + torch.ones(5)


def test_what_training_does_not_read_does_not_travel():
    cfg = compose_train(device_waits.SMALL)
    batch = device_waits.random_batches(cfg, 0)[0]
    extra = torch.ones_like(batch.input_ids_BS)
    batch = dataclasses.replace(batch, doc_ids_BS=extra, positions_BS=extra, valid_BS=extra.bool())
    with pretended_device() as pretence:
        moved = batch.to_train(DEVICE)
        assert copies_of(pretence.sites) == 6
        assert on_host(moved) == {"domain_ids_BS", "byte_counts_BS"}
        assert moved.domain_ids_BS is batch.domain_ids_BS
        assert on_host(batch.to(DEVICE)) == set()
        assert waits_of(pretence.sites) == 0
    assert on_host(batch.to("cpu")) == on_host(batch)


def on_host(batch: Batch) -> set[str]:
    tensors = {name: x for name, x in vars(batch).items() if isinstance(x, Tensor)}
    return {name for name, x in tensors.items() if x.device.type == "cpu"}
