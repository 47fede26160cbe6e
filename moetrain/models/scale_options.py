"""The ``model.scales`` section of the typed configuration: constant factors within a decoder (Granite)."""

from dataclasses import dataclass, field
from typing import Optional

from moetrain.bounds import above


@dataclass(frozen=True)
class ScalesConfig:
    """As in maximal update parametrisation, from which Granite took them (Yang et al. 2022,
    arXiv:2203.03466)."""

    embedding: float = field(default=1.0, metadata=above(0))  # multiplies the embeddings of tokens
    residual: float = field(default=1.0, metadata=above(0))  # what each half of a block adds to the stream
    # multiplies the products of queries and keys; null: 1 / sqrt(head_dim)
    attention: Optional[float] = field(default=None, metadata=above(0))
    logits_divisor: float = field(default=1.0, metadata=above(0))
    # the factor of the embeddings to the dtype that it multiplies, as Gemma does
    round_embedding: bool = False
