"""A model that is about to be loaded, in one process: it has memory, and nothing is drawn first."""

from __future__ import annotations

from moetrain.models.decoder import Decoder
from moetrain.models.options import ModelConfig
from moetrain.moe.options import ExpertsConfig, RouterConfig
from moetrain.ops.init import on_meta_device
from moetrain.parallel.materialize import allocate


def unloaded_decoder(
    model: ModelConfig,
    router: RouterConfig,
    experts: ExpertsConfig,
    vocab_size: int,
    wide: bool = False,
    device: str = "cpu",
) -> Decoder:
    """In fp32, or ``wide`` in fp64. Values are undefined: every tensor of its state has to be loaded.

    Raises what :class:`Decoder` does.
    """
    with on_meta_device():
        made = Decoder(model, router, experts, vocab_size)
    made = made.double() if wide else made
    allocate(made, device)
    return made
