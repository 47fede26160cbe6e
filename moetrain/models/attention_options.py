"""Sections of ``model`` that one kind of attention reads, named by ``model.attention`` or its pattern."""

from dataclasses import dataclass, field

from moetrain.bounds import at_least

_SIZE = at_least(1, 2**31 - 1)


@dataclass(frozen=True)
class GatedDeltaConfig:
    """Of ``gated_delta``: heads of keys (and queries) and of values, whose number is a multiple of theirs."""

    num_key_heads: int = field(default=2, metadata=_SIZE)
    num_value_heads: int = field(default=4, metadata=_SIZE)
    key_head_dim: int = field(default=64, metadata=_SIZE)
    value_head_dim: int = field(default=64, metadata=_SIZE)
    # tokens that the short convolution over queries, keys and values reads, the last one's own included
    conv_width: int = field(default=4, metadata=at_least(1, 2**10))


# section of ``model`` -> the attention that reads it
READ_BY = {"gated_delta": "gated_delta", "latent": "latent"}
