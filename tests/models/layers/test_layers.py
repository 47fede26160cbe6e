"""What every layer without a dispatch of tokens keeps: causality, decoding, recompute, rows apart, precision.

Shapes: B batch, S sequence, D model.
"""

from __future__ import annotations

import pytest
import torch
from layer_cases import LAYERS, layer_decoder
from model_cases import VOCAB, tokens
from torch import Tensor

from moetrain.models import KVCache, cross_entropy_sum
from moetrain.models.decoder import Decoder
from moetrain.moe import RouterContext
from moetrain.parallel.apply import parallelize
from moetrain.parallel.mesh import Meshes


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_later_tokens_and_other_rows_change_nothing(name: str, training: bool) -> None:
    model, ids = layer_decoder(name).train(training), tokens(3, 13)
    hidden = model(ids).hidden_BSD
    alone = RouterContext(1, 13, torch.tensor([1]))  # noise goes by the sample's number
    close(hidden[1:2], model(ids[1:2], alone).hidden_BSD)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    close(hidden[:, :5], model(changed).hidden_BSD[:, :5])
    assert not torch.equal(hidden[:, 5], model(changed).hidden_BSD[:, 5])


@pytest.mark.parametrize("parts", [(1,) * 13, (4, 1, 5, 3), (2, 11)])
@pytest.mark.parametrize("name", LAYERS)
def test_decoding_by_parts_is_the_whole(name: str, parts: tuple[int, ...]) -> None:
    model, ids = layer_decoder(name).eval(), tokens(2, 13)
    cache = KVCache(len(model.blocks), 13)
    decoded = [model(part, cache=cache).hidden_BSD for part in ids.split(parts, dim=1)]
    close(torch.cat(decoded, 1), model(ids).hidden_BSD)


def loss_and_gradients(model: Decoder, ids: Tensor) -> list[Tensor]:
    out = model(ids)
    total, count = cross_entropy_sum(out.hidden_BSD[:, :-1], model.head_weight, ids[:, 1:])
    return [total.detach() / count, *torch.autograd.grad(total / count, list(model.parameters()))]


@pytest.mark.parametrize("name", LAYERS)
def test_recompute_changes_no_bit_and_no_state(name: str) -> None:
    model, ids = layer_decoder(name), tokens(2, 13)
    before = [buffer.clone() for buffer in model.buffers()]
    plain = loss_and_gradients(model, ids)
    assert all(gradient.any() for gradient in plain)
    parallelize(model, Meshes(), recompute=True)
    again = loss_and_gradients(model, ids)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_in_bf16_it_is_near_fp32_and_gradients_are_finite(name: str) -> None:
    model, ids = layer_decoder(name).float(), tokens(2, 13)
    exact = model(ids).hidden_BSD
    parallelize(model, Meshes(), compute_dtype=torch.bfloat16)
    model.compute_dtype = torch.bfloat16
    rounded = model(ids).hidden_BSD
    assert rounded.dtype is torch.bfloat16
    assert (rounded - exact).abs().mean() < 0.1 * exact.abs().mean()
    gradients = torch.autograd.grad(rounded.float().square().sum(), list(model.parameters()))
    assert all(gradient.isfinite().all() and gradient.dtype is torch.float32 for gradient in gradients)


@pytest.mark.parametrize("name", LAYERS)
def test_no_tokens_at_all(name: str) -> None:
    model = layer_decoder(name)
    out = model(tokens(0, 5))
    assert out.hidden_BSD.shape == (0, 5, 23)
    out.hidden_BSD.sum().backward()
