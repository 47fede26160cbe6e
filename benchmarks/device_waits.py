"""What in a training step waits for the device, and what it copies there: a table, made without a GPU.

    python benchmarks/device_waits.py [KEY=VALUE ...] [--presets]

Options are those of ``moetrain train``, after those of a small model; one process. The second of two steps is
counted, on random tokens without documents or padding, along a GPU's paths: see ``pretended_device.py``.
``--presets``: one line for each router that ships, in its own preset.

Shapes: B sequences, S positions.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pretended_device import DEVICE, Site, copies_of, pretended_device, waits_of

import moetrain
from moetrain.config.hydra.compose import compose_train
from moetrain.config.validate import validate
from moetrain.data import Batch
from moetrain.errors import UserError
from moetrain.train.assemble import Assembled, assemble
from moetrain.train.options import TrainConfig

VOCAB, STEPS = 263, 2
SMALL = [
    "data.tokenizer.kind=bytes", f"model.vocab_size={VOCAB}", "model.d_model=32", "model.num_layers=3",
    "model.num_heads=2", "model.d_ff=48", "model.d_ff_expert=16", "model.num_experts=5",
    "model.first_dense=1", "data.seq_len=13", "train.micro_batch_size=2", "train.global_batch_tokens=52",
    "train.precision=fp32",
]  # fmt: skip
PRESETS = Path(moetrain.__file__).parent / "configs" / "router"


@dataclass(frozen=True)
class Found:
    """Of one step: ``sites`` and how often each; ``passes`` of MoE layers, forward passes ahead included."""

    sites: Counter[Site]
    passes: int
    loss: float

    @property
    def waits(self) -> int:
        return waits_of(self.sites)

    @property
    def copies(self) -> int:
        return copies_of(self.sites)


def random_batches(cfg: TrainConfig, step: int) -> list[Batch]:
    """A step's micro-batches as the loader makes them, of one document and without padding."""
    rows, seq = cfg.train.micro_batch_size, cfg.data.seq_len
    draw = torch.Generator().manual_seed(step)

    def one(number: int) -> Batch:
        ids_BS = torch.randint(0, VOCAB, (rows, seq + 1), generator=draw)
        samples_B, none_BS = torch.arange(rows) + number * rows, torch.zeros(rows, seq, dtype=torch.int64)
        inputs_BS, labels_BS = ids_BS[:, :-1].contiguous(), ids_BS[:, 1:].contiguous()
        return Batch(inputs_BS, labels_BS, None, None, samples_B, none_BS, none_BS, None, labels_BS.numel())

    return [one(number) for number in range(cfg.train.global_batch_tokens // (rows * seq))]


def count(cfg: TrainConfig, adjust: Callable[[Assembled], None] = lambda made: None) -> Found:
    """The waits and copies of the second step. ``adjust`` may change what was built before the first."""
    passes = 0

    def passed(*unused: object) -> None:
        nonlocal passes
        passes += 1

    with pretended_device() as pretence:
        made = assemble(cfg, VOCAB, str(DEVICE), 1)
        adjust(made)
        for (layer,) in made.task.model.moe_layers().values():
            layer.register_forward_pre_hook(passed)
        for step in range(STEPS):
            passes = 0
            pretence.sites.clear()
            result = made.step.run(step, random_batches(cfg, step))
        return Found(Counter(pretence.sites), passes, result.loss)


def show(cfg: TrainConfig, found: Found) -> None:
    print(
        f"router={cfg.router.name}: {found.passes} passes of MoE layers a step; {found.waits} waits, "
        f"{found.copies} copies to the device"
    )
    print(f"{'times':>6}  {'':26}{'operator':22}where")
    for site, times in sorted(found.sites.items(), key=lambda item: item[0].place):
        kind = ("copy, waits" if site.wait else "copy") if site.to_device else "wait"
        print(f"{times:6}  {kind:26}{site.op:22}{site.place} {site.function}")


def show_presets(overrides: list[str]) -> None:
    print(f"{'router':20}{'passes':>8}{'waits':>8}{'a pass':>8}{'copies':>8}")
    for preset in sorted(path.stem for path in PRESETS.glob("*.yaml")):
        cfg = compose_train([*SMALL, f"router={preset}", *overrides])
        found = count(cfg)
        a_pass = (found.waits - 2) / found.passes
        print(f"{preset:20}{found.passes:8}{found.waits:8}{a_pass:8.2f}{found.copies:8}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE, as moetrain train takes them")
    parser.add_argument("--presets", action="store_true", help="one line for each router")
    args = parser.parse_args()
    try:
        if args.presets:
            show_presets(args.overrides)
            return 0
        cfg = compose_train([*SMALL, *args.overrides])
        validate(cfg, 1)
        show(cfg, count(cfg))
    except UserError as error:
        print(f"device_waits: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
