"""Initial values by counter: the arithmetic written out, the distribution, a block as the whole has it."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from torch import nn

from moetrain.moe import ROUTERS, MoELayer
from moetrain.ops.counter import normal, stream_key
from moetrain.ops.init import (
    Constant,
    EqualRows,
    Normal,
    Orthogonal,
    Uniform,
    init_block,
    initializer_of,
    on_meta_device,
    parameter,
    set_initializer,
)
from moetrain.parallel.materialize import allocate, draw

MASK = 2**64 - 1


def mixed(x: int) -> int:
    """splitmix64, as its authors publish it."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def probability(seed: int, name: str, index: int) -> float:
    key = int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little")
    return ((mixed(mixed(index) ^ key) >> 12) + 0.5) / 2**52


@pytest.mark.parametrize("first", [0, 10**6, 2**40])
def test_a_value_is_the_inverse_of_the_normal_distribution(first):
    """The library's inverse is the oracle: AS 241's short form is said to hold 7 digits."""
    values = normal(stream_key(3, "blocks.0.w"), torch.arange(first, first + 5003))
    wanted = special.ndtri([probability(3, "blocks.0.w", first + i) for i in range(5003)])
    torch.testing.assert_close(values, torch.from_numpy(wanted), rtol=3e-7, atol=3e-7)


def test_far_tails_too(monkeypatch):
    """The least probability of all lies 8 standard deviations out; no stream of a test meets it."""
    monkeypatch.setattr("moetrain.ops.counter.mix", lambda x: x)
    bits = torch.tensor([0, 1, 7, 2**20, 2**30, 2**52 - 1, 2**52 - 2])
    wanted = special.ndtri((bits.numpy() + 0.5) / 2**52)
    torch.testing.assert_close(normal(0, bits << 12), torch.from_numpy(wanted), rtol=3e-7, atol=0)


def test_the_distribution_is_normal_and_streams_are_apart():
    one, other = (normal(stream_key(7, name), torch.arange(200_003)) for name in ("a", "b"))
    assert stats.kstest(one.numpy(), "norm").pvalue > 0.01
    assert stats.kstest(other.numpy(), "norm").pvalue > 0.01
    for shifted in (other[:-1], one[1:], normal(stream_key(8, "a"), torch.arange(200_002))):
        assert abs(torch.corrcoef(torch.stack([one[:-1], shifted]))[0, 1]) < 4 / math.sqrt(200_002)


def test_uniform_values_and_their_logarithms():
    plain, logs = torch.empty(5003), torch.empty(5003)
    init_block(plain, Uniform(0.5, 3.0), 3, "w", (5003,), (0,))
    init_block(logs, Uniform(0.5, 3.0, log=True), 3, "w", (5003,), (0,))
    wanted = torch.tensor([0.5 + 2.5 * probability(3, "w", i) for i in range(5003)])
    torch.testing.assert_close(plain, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(logs, wanted.double().log().float(), rtol=1e-6, atol=1e-6)


@given(st.data())
def test_a_block_is_that_block_of_the_whole(data):
    shape = data.draw(st.lists(st.integers(1, 13), min_size=1, max_size=3))
    initializer = data.draw(
        st.sampled_from(
            [Normal(0.3), Constant(2.5)]
            + [Orthogonal(0.7), EqualRows(0.6)] * (len(shape) == 2)
            + [Uniform(-0.3, 0.9), Uniform(0.2, 7.0, log=True)] * (len(shape) == 1)
        )
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    whole = torch.full(shape, torch.nan, dtype=dtype)
    init_block(whole, initializer, 5, "w", shape, [0] * len(shape))
    begin = [data.draw(st.integers(0, size)) for size in shape]
    end = [data.draw(st.integers(at, size)) for at, size in zip(begin, shape, strict=True)]
    here = tuple(slice(*pair) for pair in zip(begin, end, strict=True))
    block = torch.full_like(whole[here].contiguous(), torch.nan)
    init_block(block, initializer, 5, "w", shape, begin)
    assert block.equal(whole[here])


def test_no_threads_and_no_instruction_set_change_a_bit():
    """Many blocks' worth; a digest, since another machine must find the same."""
    digests, before = set(), torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        block = torch.empty(311, 409)
        init_block(block, Normal(0.02), 5, "w", block.shape, (0, 0))
        digests.add(hashlib.sha256(block.numpy().tobytes()).hexdigest()[:16])
    torch.set_num_threads(before)
    assert digests == {"62391bd902694159"}
    square = torch.empty(37, 61)
    init_block(square, Orthogonal(), 5, "w", square.shape, (0, 0))
    assert hashlib.sha256(square.numpy().tobytes()).hexdigest()[:16] == "f51733fbcf27641c"


@pytest.mark.parametrize("shape", [(5, 13), (13, 5), (7, 7), (1, 3)])
def test_orthogonal_means_orthonormal(shape):
    made = torch.empty(shape, dtype=torch.float64)
    init_block(made, Orthogonal(3.0), 1, "w", shape, (0, 0))
    gram = made @ made.T if shape[0] <= shape[1] else made.T @ made
    torch.testing.assert_close(gram, 9 * torch.eye(min(shape), dtype=torch.float64), rtol=0, atol=1e-5)


def test_a_layer_by_itself_holds_values_and_one_on_meta_none():
    layer = MoELayer(7, 11, 5, "topk", router_options={"top_k": 2})
    with on_meta_device():
        later = MoELayer(7, 11, 5, "topk", router_options={"top_k": 2})
    for (name, made), empty in zip(layer.named_parameters(), later.parameters(), strict=True):
        assert made.isfinite().all()
        assert made.any()
        assert empty.is_meta == (not name.startswith("router."))  # routers are small
        assert initializer_of(empty) == initializer_of(made) is not None
    assert not any(buffer.is_meta for buffer in later.buffers())


@pytest.mark.parametrize(
    "own", [nn.init.zeros_, nn.init.orthogonal_, lambda weight: nn.init.constant_(weight, 3)]
)
def test_what_a_plugins_router_writes_itself_is_kept(own, monkeypatch):
    class Own(ROUTERS["topk"].cls):
        def __init__(self, *args):
            super().__init__(*args)
            own(self.weight_ED)

    monkeypatch.setitem(ROUTERS, "own", replace(ROUTERS["topk"], name="own", cls=Own))
    torch.manual_seed(3)
    with on_meta_device():
        router = MoELayer(7, 11, 5, "own", router_options={"top_k": 2}).router
    wanted = router.weight_ED.detach().clone()
    allocate(router, "cpu")
    draw(router, 1)
    assert torch.equal(router.weight_ED, wanted)
    assert initializer_of(router.weight_ED) is None


def test_a_parameter_gets_another_initializer():
    made = parameter((3, 5), Constant(2.0))
    assert (made == 2).all()
    set_initializer(made, Normal(1e-3))
    assert initializer_of(made) == Normal(1e-3)
    assert made.abs().max() < 0.1


def test_equal_rows_have_one_norm_and_normal_directions():
    shape = (13, 31)
    made, drawn = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)
    init_block(made, EqualRows(0.3), 7, "w", shape, (0, 0))
    init_block(drawn, Normal(1.0), 7, "w", shape, (0, 0))
    norms = made.norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 0.3 * 31**0.5), rtol=1e-6, atol=0)
    cosines = torch.nn.functional.cosine_similarity(made, drawn)
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-6)
    module = nn.Module()
    module.w = parameter(shape, EqualRows(0.3))
    norms = module.w.detach().norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 0.3 * 31**0.5), rtol=1e-5, atol=0)
