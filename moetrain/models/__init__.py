"""The decoder, its loss, generation and counting."""

from moetrain.models import gated_delta as gated_delta
from moetrain.models import latent as latent
from moetrain.models import layers as layers
from moetrain.models.cache import KVCache
from moetrain.models.count import count_parameters, flops_per_token
from moetrain.models.decoder import Decoder, DecoderOutput
from moetrain.models.generate import generate
from moetrain.models.loss import cross_entropy_sum, token_nll

__all__ = [
    "Decoder",
    "DecoderOutput",
    "KVCache",
    "count_parameters",
    "cross_entropy_sum",
    "flops_per_token",
    "generate",
    "token_nll",
]
