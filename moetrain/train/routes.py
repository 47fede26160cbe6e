"""A record of routes: the experts that tokens took in one forward pass, for another of the same tokens.

A record is a folder. ``routes.json`` says what the layers are; each file of safetensors holds some sequences:
their sample ids, their tokens, and each token's experts in each layer, in the router's order. It is looked up
by sample and position, so it fits any layout and micro-batch, and the same tokens alone.

Shapes: B sequences, S positions, T = B S tokens, K experts a token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moetrain.errors import UserError
from moetrain.files import MB, read_json
from moetrain.moe import Router, Routing, RoutingRecord
from moetrain.plain import plain
from moetrain.writing import replacing, write_atomic

DESCRIPTION = "routes.json"
_FORMAT = 1
_Count = Annotated[int, Field(ge=1, le=2**24)]


@dataclass(frozen=True)
class RoutedLayer:
    """A layer's number of experts, and how many a token takes."""

    experts: _Count
    top_k: _Count

    def __str__(self) -> str:
        return f"{self.top_k} of {self.experts} experts a token"


@dataclass(frozen=True)
class Description:
    """``routes.json``: the layers by their places in the decoder."""

    format: int
    layers: dict[str, RoutedLayer]


def replay_refusal(routers: Mapping[int, Router]) -> str | None:
    """Why a model with these routers, by place, can neither be recorded nor forced; None where it can."""
    if not routers:
        return "the model has no router: set replay.record=null and replay.force=null"
    for router in routers.values():
        name = router.options.name
        if not router.replays:
            return f"router={name} cannot be told which experts to take: leave replay.record and .force out"
        if router.options.drops:
            return (
                f"a record is of all that router={name} chooses, and a capacity or rounding takes some away: "
                "set router.capacity_factor=null, router.eval_capacity_factor=null and router.rounding=none"
            )
    return None


def describe(routers: Mapping[int, Router]) -> Description:
    """What a record of these routers is of. Raises UserError where they cannot be recorded or forced."""
    if line := replay_refusal(routers):
        raise UserError(line)
    layers = {str(n): RoutedLayer(r.num_experts, int(r.top_k or 0)) for n, r in sorted(routers.items())}
    return Description(_FORMAT, layers)


def read_description(folder: Path, key: str = "replay.force") -> Description:
    """Raises UserError, which begins with ``key``, where the folder holds no record that can be read."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{key}={folder} holds no record of routes: there is no {path}")
    found = read_json(path, Description, MB)
    if found.format != _FORMAT:
        raise UserError(
            f"{path}: format {found.format}, and this version reads format {_FORMAT}: record it anew"
        )
    return found


class RouteWriter:
    """Writes a record, a file at a time. Several ranks may write to one folder, to files of their own.

    Raises UserError for routers that cannot be recorded, and for a folder with a record of other layers.
    """

    def __init__(
        self, folder: Path, routers: Mapping[int, Router], main: bool = True, key: str = "replay.record"
    ) -> None:
        self.folder, self.described = folder, describe(routers)
        if (folder / DESCRIPTION).exists():
            _same_layers(read_description(folder, key), self.described, f"{key}={folder}")
        elif main:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / DESCRIPTION, json.dumps(plain(self.described), indent=1) + "\n")
        self._rows: list[dict[str, Tensor]] = []

    def add(
        self,
        sample_ids_B: Tensor,
        tokens_BS: Tensor,
        valid_BS: Tensor | None,
        records: Mapping[int, RoutingRecord],
    ) -> None:
        """Keep one micro-batch: a layer's place -> what its router told. Waits for the device."""
        self.keep(sample_ids_B, tokens_BS, valid_BS, self.routes(tokens_BS, records))

    def routes(self, tokens_BS: Tensor, records: Mapping[int, RoutingRecord]) -> dict[str, Tensor]:
        """What the file calls a layer's experts -> int32 [B, S, K], -1 in padding."""
        found = {}
        for place, layer in self.described.layers.items():
            record = records[int(place)]
            assert isinstance(record, Routing)
            ids_TK = routed_ids(record, tokens_BS.numel(), layer.top_k)
            found[f"experts.{place}"] = ids_TK.view(*tokens_BS.shape, layer.top_k)
        return found

    def keep(
        self, sample_ids_B: Tensor, tokens_BS: Tensor, valid_BS: Tensor | None, routes: Mapping[str, Tensor]
    ) -> None:
        """Keep sequences with their routes, as :meth:`routes` gives them."""
        valid_BS = torch.ones_like(tokens_BS, dtype=torch.bool) if valid_BS is None else valid_BS
        rows = {"samples": sample_ids_B, "tokens": tokens_BS.int(), "valid": valid_BS, **routes}
        self._rows.append({name: tensor.detach().cpu() for name, tensor in rows.items()})

    def flush(self, name: str) -> None:
        """Write what was added since to ``<name>.safetensors``; nothing where nothing was."""
        if self._rows:
            whole = {key: torch.cat([rows[key] for rows in self._rows]) for key in self._rows[0]}
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{name}.safetensors"
            try:
                with replacing(path) as temporary:
                    save_file(whole, temporary)
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror}") from error
        self._rows = []


def routed_ids(routing: Routing, tokens: int, top_k: int) -> Tensor:
    """The experts of each token in its router's order, int32 [T, K]; -1 in padding."""
    a = routing.assignment
    assert a.choice_N is not None
    ids_TK = torch.full((tokens, top_k), -1, dtype=torch.int32, device=a.token_ids_N.device)
    ids_TK[a.token_ids_N, a.choice_N] = a.expert_ids_N().int()
    return ids_TK


class RouteReader:
    """Looks tokens up in a record. Raises UserError where it is of other layers, or holds a sample twice."""

    def __init__(self, folder: Path, routers: Mapping[int, Router], key: str = "replay.force") -> None:
        self.where, self.layers = f"{key}={folder}", describe(routers).layers
        _same_layers(read_description(folder, key), describe(routers), self.where)
        self._place: dict[int, tuple[Path, int]] = {}
        self._open: tuple[Path, dict[str, Tensor]] | None = None
        for path in sorted(folder.glob("*.safetensors")):
            for row, sample in enumerate(_load(path, ["samples"])["samples"].reshape(-1).tolist()):
                if sample in self._place:
                    names = f"{self._place[sample][0].name} and {path.name}"
                    raise UserError(
                        f"{self.where}: sample {sample} is in {names}: record into an empty folder"
                    )
                self._place[sample] = path, row

    def forced(
        self, sample_ids_B: Tensor, tokens_BS: Tensor, valid_BS: Tensor | None = None
    ) -> dict[int, Tensor]:
        """A layer's place -> the experts [T, K] of a batch's tokens, int64 on the host, 0 in padding.

        A row may be shorter than what was recorded of it. Raises UserError for a sample or a position that
        was not recorded, and for a token that is another one there.
        """
        batch, seq = tokens_BS.shape
        valid_BS = torch.ones(batch, seq, dtype=torch.bool) if valid_BS is None else valid_BS.cpu()
        found = {
            int(n): torch.zeros(batch, seq, layer.top_k, dtype=torch.int64)
            for n, layer in self.layers.items()
        }
        for b, (sample, tokens_S) in enumerate(zip(sample_ids_B.tolist(), tokens_BS.cpu(), strict=True)):
            rows, row = self._rows_of(sample)
            self._check_tokens(sample, tokens_S, valid_BS[b], rows["tokens"][row], rows["valid"][row])
            length = int(valid_BS[b].nonzero().max()) + 1 if bool(valid_BS[b].any()) else 0
            for place, ids_BSK in found.items():
                ids_BSK[b, :length] = rows[f"experts.{place}"][row, :length].clamp(min=0)
        return {place: ids_BSK.view(batch * seq, -1) for place, ids_BSK in found.items()}

    def _rows_of(self, sample: int) -> tuple[dict[str, Tensor], int]:
        if sample not in self._place:
            raise UserError(f"{self.where}: sample {sample} was not recorded (of {len(self._place)} samples)")
        path, row = self._place[sample]
        if self._open is None or self._open[0] != path:
            rows = _load(path, ["samples", "tokens", "valid", *(f"experts.{place}" for place in self.layers)])
            _check_rows(path, rows, self.layers)
            self._open = path, rows
        return self._open[1], row

    def _check_tokens(
        self, sample: int, tokens_S: Tensor, valid_S: Tensor, there_S: Tensor, known_S: Tensor
    ) -> None:
        length = min(len(tokens_S), len(there_S))
        known, there = torch.zeros_like(valid_S), torch.zeros_like(tokens_S)
        known[:length], there[:length] = known_S[:length], there_S[:length].to(there.dtype)
        if bool((missing := valid_S & ~known).any()):
            raise UserError(f"{self.where}: sample {sample} was not recorded at position {_first(missing)}")
        if bool((other := valid_S & (there != tokens_S)).any()):
            at = _first(other)
            raise UserError(
                f"{self.where}: sample {sample} had token {int(there[at])} at position {at}, and has "
                f"{int(tokens_S[at])} now: a record fits the tokens that it was made of"
            )


def _first(mask_S: Tensor) -> int:
    return int(mask_S.nonzero()[0])


def _same_layers(recorded: Description, here: Description, where: str) -> None:
    if list(recorded.layers) != list(here.layers):
        told = [", ".join(d.layers) or "none" for d in (recorded, here)]
        raise UserError(
            f"{where} is of routers in layers {told[0]}, and the model has them in layers {told[1]}"
        )
    for place, layer in here.layers.items():
        if recorded.layers[place] != layer:
            raise UserError(f"{where}: layer {place} was {recorded.layers[place]}, and is {layer} here")


def _load(path: Path, names: list[str]) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as a record of routes: {error}") from None


def _check_rows(path: Path, rows: Mapping[str, Tensor], layers: Mapping[str, RoutedLayer]) -> None:
    """Raise UserError unless shapes and kinds fit, and each token has its k experts."""
    samples, tokens, valid = rows["samples"], rows["tokens"], rows["valid"]
    kinds = (samples.dtype, tokens.dtype, valid.dtype) == (torch.int64, torch.int32, torch.bool)
    if (
        not kinds
        or samples.ndim != 1
        or tokens.ndim != 2
        or valid.shape != tokens.shape
        or len(tokens) != len(samples)
    ):
        raise UserError(f"{path}: its samples, tokens and valid do not fit one another: record it anew")
    for place, layer in layers.items():
        ids = rows[f"experts.{place}"]
        if ids.dtype != torch.int32 or ids.shape != (*tokens.shape, layer.top_k):
            raise UserError(
                f"{path}: experts.{place} is {ids.dtype} {list(ids.shape)}, of tokens {list(tokens.shape)}"
            )
        taken = ids[valid].sort(-1).values
        outside = bool(((taken < 0) | (taken >= layer.experts)).any())
        if outside or bool((taken[:, 1:] == taken[:, :-1]).any()):
            raise UserError(
                f"{path}: experts.{place} has a token without {layer.top_k} experts of {layer.experts}"
            )
