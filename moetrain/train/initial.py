"""``init_from``: a model's first weights, from another run or from Hugging Face's files, under any layout."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from moetrain.checkpoint.peers import Peers
from moetrain.checkpoint.read import fill, fill_from, find_checkpoint, read_metadata
from moetrain.checkpoint.state_dict import MODEL, OPTIM
from moetrain.data import Tokenizer, load_tokenizer
from moetrain.errors import UserError
from moetrain.models.future import is_join
from moetrain.models.hf.carried import CARRIED, carry_files
from moetrain.models.hf.pieces import fill_block
from moetrain.models.hf.source import Opened, SafetensorsFolder, open_source
from moetrain.models.options import future_layers
from moetrain.ops.low_rank import factor_start, is_factor
from moetrain.parallel.materialize import draw_tensor
from moetrain.terminal import tell
from moetrain.train.identity import require_same_files
from moetrain.train.run_files import CONFIG, TOKENIZER, ReadConfig


def load_initial(
    path: Path,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    read: ReadConfig,
    seed: int = 0,
) -> None:
    """Fill ``model`` (``model.<name>`` -> tensor), whatever dtype and layout its values are stored in.

    Low-rank products, where ``path`` has none, start as they do in a new model of ``seed``.
    ``optimizer`` (``optim.<name>.<key>``) is filled as well; empty: its state starts anew. Collective.
    ``path`` is a run folder, one made by convert or upcycle, or a Hugging Face folder. Raises UserError where
    the model is another one, its files were changed since, or ``tokenizer`` is not the one that its embedding
    belongs to.
    """
    peers = Peers()
    peers.together(lambda: _check_tokenizer(path, tokenizer))
    if (path / CONFIG).is_file():
        checkpoint = find_checkpoint(path, peers)
        peers.from_first(lambda: require_same_files(checkpoint, read))
        stored, complaint = read_metadata(checkpoint)
        peers.raise_together(complaint)
        further = peers.from_first(lambda: _not_taken(path, read, model))
        model = _without_new(model, stored.state_dict_metadata, seed)
        fill(checkpoint, model, MODEL, peers, cast=True, without=further)
        if optimizer:
            fill(checkpoint, optimizer, OPTIM, peers, cast=True, without=further)
        return
    if optimizer:
        raise UserError(f"init_optimizer=true, but init_from={path} is a Hugging Face folder: it holds none")
    taken = any(is_join(name) for name in model)
    opened = peers.together(lambda: open_source(SafetensorsFolder(path), taken))
    reader = _PiecesReader(opened)
    model = _without_new(model, (), seed)
    fill_from(reader, reader.read_metadata(), f"init_from={path}", model, MODEL, peers, cast=True)


def _not_taken(path: Path, read: ReadConfig, model: Mapping[str, Tensor]) -> tuple[str, ...]:
    """How the names begin of layers of ``path`` that predict further tokens, where ``model`` has none."""
    layers = future_layers(read(path / CONFIG).model)
    if not layers or any(is_join(name) for name in model):
        return ()
    tell(
        f"left out of {path}: {len(layers)} layer(s) that predict further tokens: "
        f"model.future.layers={len(layers)} would take them",
        sys.stderr,
    )
    return tuple(f"{kind}blocks.{layer}." for layer in layers for kind in (MODEL, OPTIM))


def _without_new(model: Mapping[str, Tensor], stored: Collection[str], seed: int) -> dict[str, Tensor]:
    """What is to be loaded; low-rank factors are drawn here where nothing stored is one."""
    fresh = {} if any(map(is_factor, stored)) else {n: t for n, t in model.items() if is_factor(n)}
    for name, tensor in fresh.items():
        draw_tensor(tensor, factor_start(name, tensor.shape), seed, name)
    return {name: tensor for name, tensor in model.items() if name not in fresh}


def carry_over(path: Path, run_dir: Path) -> None:
    """Keep what other tools want of the model that a run starts from, for its export. Rank 0 calls it."""
    ours = (path / CONFIG).is_file()
    carry_files(path / CARRIED if ours else path, run_dir / CARRIED)


def _check_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    ours = (path / CONFIG).is_file()
    folder = path / TOKENIZER if ours else path
    if not ours and not (folder / "tokenizer.json").is_file():
        return  # none that can be read here; the user chose the tokenizer
    own = load_tokenizer(folder)
    if own.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"init_from={path} was trained with the tokenizer in {folder} ({own.vocab_size} tokens), but "
            f"data.tokenizer is another one ({tokenizer.vocab_size} tokens): its ids would mean other text; "
            f"leave data.tokenizer out"
        )


class _PiecesReader(FileSystemReader):
    """Serves blocks of our tensors out of Hugging Face's, so that DCP can fill any layout from them."""

    def __init__(self, opened: Opened) -> None:
        super().__init__(opened.source.path)
        self._opened = opened

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        storage: dict[MetadataIndex, Any] = {}
        for name, info in self._opened.infos.items():
            shape = torch.Size(info.shape)
            chunk = ChunkStorageMetadata(torch.Size([0] * len(shape)), shape)
            tensors[MODEL + name] = TensorStorageMetadata(TensorProperties(dtype=info.dtype), shape, [chunk])
            storage[MetadataIndex(MODEL + name, chunk.offsets)] = None
        return Metadata(state_dict_metadata=tensors, storage_data=storage)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            target = planner.resolve_tensor(item)
            pieces = self._opened.table[item.storage_index.fqn.removeprefix(MODEL)].pieces
            fill_block(target.detach(), item.storage_offsets, pieces, self._opened.source.read)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done
