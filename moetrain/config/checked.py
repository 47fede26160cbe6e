"""A config that is composed and validated, once: what ``train()`` is to be called with."""

from __future__ import annotations

from moetrain.config.elastic import for_ranks
from moetrain.config.hydra.compose import compose_arms, compose_train
from moetrain.config.layout import of_layout
from moetrain.config.validate import validate
from moetrain.errors import UserError
from moetrain.train.options import TrainConfig

Checked = tuple[TrainConfig, list[str]]  # a valid config, and what is to be said of it


def checked(
    overrides: list[str], world: int = 1, config_name: str = "train", config_dir: str | None = None
) -> Checked:
    """The config that ``moetrain train <overrides>`` runs on ``world`` ranks, and what is to be said of it.

    What the layout decides of a router stands in it (``layout.py``).
    :func:`moetrain.train.run.train` takes both, and the reader of stored configs, as in
    ``train(cfg, load_yaml, notes)``. Raises UserError for what cannot be composed, and for the first broken
    rule.
    """
    return _checked(compose_train(overrides, config_name, config_dir), world)


def checked_arms(
    cfg: TrainConfig,
    overrides: list[str],
    world: int = 1,
    config_name: str = "train",
    config_dir: str | None = None,
) -> dict[str, Checked]:
    """Each arm of ``cfg.compare`` likewise, under its name; ``overrides`` are those that made ``cfg``."""
    found = {}
    for name, arm in compose_arms(cfg, overrides, config_name, config_dir).items():
        try:
            found[name] = _checked(arm, world)
        except UserError as e:
            raise UserError(f"compare.arms.{name}: {e}") from e
    return found


def _checked(cfg: TrainConfig, world: int) -> Checked:
    cfg, changed = for_ranks(cfg, world)
    cfg = of_layout(cfg, world)
    return cfg, [*changed, *validate(cfg, world)]
