"""Norms and rotations are not kept for backward, and nothing that is computed changes by a bit.

Shapes: B sequences, S positions, D model, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from model_cases import decoder, tokens
from torch import Tensor, nn

from moetrain.models.decoder import Decoder
from moetrain.models.norm import rms_norm
from moetrain.ops.cheap import cheap, dropping_cheap, source
from moetrain.parallel.apply import parallelize
from moetrain.parallel.mesh import Meshes


def gradients(model: Decoder) -> dict[str, Tensor]:
    hidden_BSD = model(tokens(3, 7), doc_ids_BS=(torch.arange(7) > 2).long().expand(3, 7)).hidden_BSD
    model.logits(hidden_BSD).logsumexp(-1).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": "head"}, {"qk_norm": "full"}, {"num_shared_experts": 1}], ids=str
)
def test_gradients_have_the_same_bits(options):
    from moetrain.models.options import QKNorm

    options = {key: QKNorm(value) if key == "qk_norm" else value for key, value in options.items()}
    plain, dropping = decoder(torch.float32, **options), decoder(torch.float32, **options)
    parallelize(dropping, Meshes())
    for (name, expected), found in zip(gradients(plain).items(), gradients(dropping).values(), strict=True):
        assert torch.equal(expected, found), name


class Layer(nn.Module):
    """A norm whose result two products want, and a view of which another keeps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm_D = nn.Parameter(torch.rand(64))
        self.w_DD = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        normed = rms_norm(x, self.norm_D, 1e-6)
        return (normed @ self.w_DD).sum() + normed.square().sum() + normed.view(-1, 8, 8)[:, 2:5].sin().sum()


def kept_bytes(layer: Layer, x: Tensor, dropping: bool) -> tuple[int, Tensor]:
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    x = x.clone().requires_grad_()
    if dropping:
        import moetrain.ops.cheap as module

        pack = module._pack
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_pack", lambda t: note(p) if isinstance(p := pack(t), Tensor) else p)
            with dropping_cheap():
                loss = layer(x)
    else:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = layer(x)
    loss.backward()
    return sum(sizes.values()), x.grad


def test_what_is_cheap_is_not_kept():
    layer, x = Layer(), torch.randn(31, 64)
    (plain, expected), (less, found) = kept_bytes(layer, x, False), kept_bytes(layer, x, True)
    assert plain - less == x.nbytes  # the norm's result, once for all that want it
    assert torch.equal(expected, found)


def test_a_result_of_a_result_is_made_from_what_is_kept():
    x = torch.arange(6.0).requires_grad_()
    made = []

    def double(y: Tensor) -> Tensor:
        return made.append(1) or y * 2

    with dropping_cheap():
        of_x, y = source(x), double(x)
        cheap(y, lambda: double(of_x()))
        of_y, z = source(y[1:4]), double(y[1:4])
        cheap(z, lambda: double(of_y()))
        loss = z.exp().log().square().sum()
        before = len(made)
    loss.backward()
    assert before == 2
    assert len(made) == 2  # exp keeps its own result: nothing asked for z
    assert x.grad.tolist() == [0.0, *(2 * 4 * 4 * v for v in (1.0, 2.0, 3.0)), 0.0, 0.0]


def failing(x: Tensor) -> None:
    with dropping_cheap():
        cheap(x, lambda: torch.zeros(3))
        raise ZeroDivisionError


def test_outside_of_a_block_nothing_is_made_again():
    """Nor after one that failed."""
    x = torch.ones(3)
    with pytest.raises(ZeroDivisionError):
        failing(x)
    cheap(x, lambda: torch.zeros(3))
    assert source(x)().tolist() == [1.0, 1.0, 1.0]
