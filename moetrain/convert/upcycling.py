"""``moetrain upcycle``: an MoE model from dense ones, written layer by layer and proved on held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

from torch import Tensor

from moetrain.convert.calibrate import calibrate
from moetrain.convert.model_folder import write_model_folder
from moetrain.convert.open_model import StoredModel, open_model
from moetrain.convert.options import UpcycleConfig
from moetrain.convert.proof import prove
from moetrain.data import Batch, Corpus, prepare, val_batches
from moetrain.errors import UserError
from moetrain.models.count import abstract_decoder, count_parameters
from moetrain.models.hf.family import ModelSpec
from moetrain.models.hf.source import TensorInfo
from moetrain.terminal import tell
from moetrain.train.options import TrainConfig
from moetrain.train.run_files import ReadTrained
from moetrain.upcycle import Target, Upcycling
from moetrain.upcycle import prepare as prepare_upcycling


def upcycle(cfg: UpcycleConfig, read: ReadTrained) -> int:
    """Returns the exit code. Raises UserError for what the user can mend; nothing is written then."""
    source = open_model(Path(cfg.source).expanduser(), read)
    donors = [open_model(Path(path).expanduser(), read) for path in cfg.donors]
    for donor in donors:
        if donor.tokenizer.fingerprint != source.tokenizer.fingerprint:
            raise UserError(f"donors: {donor.path} has another tokenizer than {source.path}")
    if source.spec.model.mlp_bias:
        raise UserError(
            f"{source.path}: model.mlp_bias=true: upcycling makes experts of its dense layers, and has no "
            "biases for them"
        )
    model = replace(cfg.model, vocab_size=source.spec.vocab_size)
    target = Target(model, cfg.router, cfg.experts)
    work = prepare_upcycling(source, target, cfg.method, cfg.train.seed, None, donors, source.spec.router)
    corpus = prepare(cfg.data, cfg.train.seed) if cfg.prove or work.reads_text else None
    if corpus is not None and work.reads_text:
        rows = -(-cfg.calibration_tokens // cfg.data.seq_len)
        work = replace(work, calibration=calibrate(source, corpus, rows, work.reads_gradients))
    spec = ModelSpec(model, cfg.router, cfg.experts)
    for line in _opening_lines(source.spec, spec, work):
        tell(line)
    tensors = _Tensors(source, work)
    own = {f.name: getattr(cfg, f.name) for f in fields(TrainConfig)}

    def check(folder: Path) -> None:
        if corpus is not None and cfg.prove:
            tell(prove(source, open_model(folder, read), _proof_text(corpus, cfg), work.promise))

    write_model_folder(
        target=Path(cfg.target).expanduser(),
        cfg=replace(TrainConfig(**own), model=model),
        tokenizer=source.tokenizer,
        carry=source.carry,
        tensors=tensors.infos,
        read=tensors.read,
        origin={
            "source": str(source.path),
            "donors": [str(d.path) for d in donors],
            "method": cfg.method.name,
        },
        check=check,
    )
    tell(f"train on: moetrain train init_from={cfg.target}")
    return 0


class _Tensors:
    """The new model's tensors in any order that goes layer by layer; one layer is held at a time."""

    def __init__(self, source: StoredModel, work: Upcycling) -> None:
        self._source, self._work = source, work
        self._passed = frozenset(work.ledger.passed)
        self._layer = -1
        self._held: dict[str, Tensor] = {}
        self.infos = self._infos()

    def read(self, name: str) -> Tensor:
        if name in self._passed:
            return self._work.passed(name)
        layer = layer_of(name)
        if layer != self._layer:
            self._layer, self._held = layer, {}
            self._held = dict(self._work.low_rank(layer))
            if layer in self._work.job.target.layers:
                self._held |= self._work.layer(layer)
        return self._held.pop(name)

    def _infos(self) -> Mapping[str, TensorInfo]:
        """Names, shapes and dtypes, of which the first new layer tells those of all."""
        infos = {name: self._source.infos[name] for name in self._work.ledger.passed}
        layers = self._work.job.target.layers
        first, start = dict(self._work.layer(layers[0])), f"blocks.{layers[0]}."
        for layer in layers:
            for name, tensor in first.items():
                info = TensorInfo(tuple(tensor.shape), tensor.dtype)
                infos[name.replace(start, f"blocks.{layer}.", 1)] = info
        for layer in range(self._work.job.target.model.num_layers):
            for name, tensor in self._work.low_rank(layer):
                infos[name] = TensorInfo(tuple(tensor.shape), tensor.dtype)
        return infos


def layer_of(name: str) -> int:
    """The number in ``blocks.<number>.<...>``, or in ``optim.blocks.<number>.<...>``."""
    parts = name.split(".")
    return int(parts[parts.index("blocks") + 1])


def _proof_text(corpus: Corpus, cfg: UpcycleConfig) -> list[Batch]:
    rows = max(1, cfg.proof_tokens // cfg.data.seq_len)
    return list(val_batches(corpus.val, 1, rows))


def _opening_lines(source: ModelSpec, target: ModelSpec, work: Upcycling) -> list[str]:
    lines = []
    for name, spec in (("source", source), ("target", target)):
        model = abstract_decoder(spec.model, spec.router, spec.experts, spec.vocab_size)
        counts = count_parameters(model)
        lines.append(
            f"{name}: {counts.total / 1e6:,.2f} M parameters, {counts.active / 1e6:,.2f} M active a token"
        )
    keeps = "keeps the function" if work.promise.preserves else "does not keep the function"
    lines.append(f"method={work.method.options.name} {keeps}: {work.promise.reason}")
    lines += [f"note: {note}" for note in work.notes]
    if work.ledger.dropped:
        lines.append(f"left out: {len(work.ledger.dropped)} tensors, as {work.ledger.dropped[0]}")
    return lines
