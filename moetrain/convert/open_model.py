"""One way to read a model, whether it lies in a run folder, a converted one or in Hugging Face's files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moetrain.checkpoint.read import run_of
from moetrain.checkpoint.state_dict import MODEL, OPTIM
from moetrain.checkpoint.stream import StoredTensors
from moetrain.convert.tokenizers import fitted, folder_tokenizer
from moetrain.data import Tokenizer, load_tokenizer
from moetrain.models.decoder import Decoder
from moetrain.models.hf.carried import CARRIED, carry_files
from moetrain.models.hf.family import ModelSpec
from moetrain.models.hf.source import SafetensorsFolder, TensorInfo, open_source
from moetrain.train.options import TrainConfig
from moetrain.train.run_files import CONFIG, TOKENIZER, ReadTrained
from moetrain.train.unloaded import unloaded_decoder


@dataclass(frozen=True)
class StoredModel(Mapping[str, Tensor]):
    """A model's tensors by our names, each read when it is asked for.

    Optimizer state, where there is any, stands beside them as ``optim.<parameter>.<key>``. ``run_dir``: the
    run or converted folder, and ``trained`` its config; None for Hugging Face's files.
    """

    path: Path
    run_dir: Path | None
    trained: TrainConfig | None
    spec: ModelSpec
    infos: Mapping[str, TensorInfo]
    tokenizer: Tokenizer
    carried_from: Path
    read: Callable[[str], Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    @property
    def weights(self) -> dict[str, TensorInfo]:
        """The model's tensors without the optimizer's."""
        return {name: info for name, info in self.infos.items() if not name.startswith(OPTIM)}

    def carry(self, folder: Path) -> None:
        carry_files(self.carried_from, folder)

    def build(self, wide: bool = False, device: str = "cpu") -> Decoder:
        """The model itself, in evaluation mode; in fp32, or in fp64 if ``wide`` or where it is stored so."""
        wide = wide or self.infos["embed_VD"].dtype is torch.float64
        spec = self.spec
        model = unloaded_decoder(spec.model, spec.router, spec.experts, spec.vocab_size, wide, device)
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(self.read(name))
        return model.eval()


def open_model(path: Path, read: ReadTrained) -> StoredModel:
    """Raises UserError where there is no model, or one that is damaged or not understood."""
    if path.is_dir() and (path / "config.json").is_file() and not (path / CONFIG).is_file():
        opened = open_source(SafetensorsFolder(path))
        advice = f"moetrain convert source={path} target=NAME tokenizer=FILE makes a model of both"
        tokenizer = fitted(folder_tokenizer(path, advice), opened.spec.vocab_size)
        return StoredModel(path, None, None, opened.spec, opened.infos, tokenizer, path, opened.read)
    stored = StoredTensors(path)
    names = {name.removeprefix(MODEL): name for name in stored.tensors if name.startswith((MODEL, OPTIM))}
    run_dir, trained = run_of(stored.path), read(stored.path)
    tokenizer = load_tokenizer(run_dir / TOKENIZER)
    vocab_size = trained.model.vocab_size or tokenizer.vocab_size
    return StoredModel(
        path=stored.path,
        run_dir=run_dir,
        trained=trained,
        spec=ModelSpec(replace(trained.model, vocab_size=vocab_size), trained.router, trained.experts),
        infos={ours: stored.tensors[name] for ours, name in names.items()},
        tokenizer=tokenizer,
        carried_from=run_dir / CARRIED,
        read=lambda name: stored.read(names[name]),
    )
