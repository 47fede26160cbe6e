"""Targets: a record of routes, its description and its rows, as a forced pass and a recording one read it."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzz.forms import any_bytes, json_file, safetensors_file
from fuzz.target import Target, Way, anything, same
from fuzz.world import EXPERTS, LAYERS, ROUTED
from moetrain.moe import Router, build_router
from moetrain.train.options import ReplayConfig
from moetrain.train.replay import check_replay
from moetrain.train.routes import DESCRIPTION, RouteReader, RouteWriter

_FOLDER, _TOP_K = Path("routes"), 2


def _routers() -> dict[int, Router]:
    """Like those of the world's run."""
    return {
        place: build_router("topk", d_model=4, num_experts=EXPERTS, top_k=_TOP_K) for place in range(LAYERS)
    }


def _forced() -> list[Any]:
    """The experts of the first tokens of both sequences in each layer; the tokens are as in the world."""
    tokens_BS = torch.tensor(ROUTED)[:, :3]
    ids = RouteReader(_FOLDER, _routers()).forced(torch.arange(2), tokens_BS)
    return [ids[place].tolist() for place in sorted(ids)]


def _rows(rng: Random, data: bytes) -> tuple[bytes, str]:
    """In the header, or anywhere: what is recorded comes after it."""
    return safetensors_file(rng, data) if rng.random() < 0.5 else any_bytes(rng, data)


def _whole(good: Any, found: Any) -> str | None:
    """Whatever was edited: each token has so many experts, that there are, and no one twice."""
    if [len(layer) for layer in found] != [len(layer) for layer in good]:
        return "differs: other layers or tokens"
    for layer in found:
        for experts in layer:
            if len(set(experts)) != _TOP_K or not set(experts) <= set(range(EXPERTS)):
                return f"differs: a token has the experts {experts}"
    return None


def _recorded() -> str:
    RouteWriter(_FOLDER, _routers()).flush("more")
    return (_FOLDER / DESCRIPTION).read_text()


def _kept(good: Any, found: Any) -> str | None:
    """A writer leaves the description that it takes as it is."""
    return None if found == (_FOLDER / DESCRIPTION).read_text() else "differs: it was written over"


def _checked() -> None:
    check_replay(ReplayConfig(force=str(_FOLDER)))


TARGETS = [
    Target(
        "routes",
        ("routes",),
        (f"routes/{DESCRIPTION}",),
        json_file,
        (Way("force", _forced, same, 3), Way("record", _recorded, _kept), Way("check", _checked, anything)),
    ),
    Target(
        "routes_rows",
        ("routes",),
        ("routes/*.safetensors",),
        _rows,
        (Way("force", _forced, _whole),),
    ),
]
