"""The description of a router's rule in evaluation, as plain values for code outside this package.

``models/hf/remote/routing_moetrain.py`` reads them: ``rule`` names a function there, the rest is its own.
"""

from __future__ import annotations

from typing import Union

Words = dict[str, Union[str, int, float, None]]


def token_choice(top_k: int, **words: Union[str, int, float, None]) -> Words:
    """The k best experts by biased softmax scores, which are the weights, but for ``words``."""
    common: Words = {"rule": "choice", "top_k": top_k, "score": "softmax", "select": "biased_scores"}
    groups: Words = {"num_groups": 1, "top_groups": None, "group_best": None, "per_group": None}
    return common | {"weights": "raw", "route_scale": 1.0, "margin": None, "threshold": None} | groups | words
