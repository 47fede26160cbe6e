"""Which class stands behind each option of a config group, and their registration with Hydra.

A group whose options differ in their keys (router, data, optim, engine, tracker) holds one schema per
option, stored as ``<group>/_<option>``: names that begin with ``_`` are never shown to the user.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_type_hints

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from moetrain.config.editable import editable
from moetrain.convert.options import ConvertConfig, ExportConfig, UpcycleConfig
from moetrain.data.chat.options import ChatData, PromptCompletionData
from moetrain.data.options import DomainsData, HubData, LocalData, MixtureData, StdlibData
from moetrain.errors import UserError
from moetrain.evaluation.options import EvalConfig
from moetrain.flat import TAGS
from moetrain.nearest import nearest
from moetrain.train.deepspeed.options import DeepSpeedConfig
from moetrain.train.log.options import JsonlTracker, TensorboardTracker, WandbTracker
from moetrain.train.optim.options import AdamW8bitConfig, AdamWConfig, MuonConfig
from moetrain.train.options import EngineConfig, GenerateConfig, TrainConfig
from moetrain.verify.options import VerifyConfig

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"


def tags_of(root: type) -> dict[str, str]:
    """The polymorphic groups of a root class, and each one's tag."""
    hints = get_type_hints(root)
    return {group: tag for group, tag in TAGS.items() if hasattr(hints.get(group), tag)}


def variants() -> dict[str, dict[str, type]]:
    """Group -> value of its tag -> frozen class. The routers are whatever is registered by now."""
    from moetrain.moe.routers import ROUTERS
    from moetrain.upcycle import METHODS

    return {
        "router": {name: spec.options for name, spec in ROUTERS.items()},
        "data": {
            "stdlib": StdlibData,
            "local": LocalData,
            "hub": HubData,
            "mixture": MixtureData,
            "domains": DomainsData,
            "chat": ChatData,
            "prompt_completion": PromptCompletionData,
        },
        "optim": {"adamw": AdamWConfig, "adamw_8bit": AdamW8bitConfig, "muon": MuonConfig},
        "engine": {"native": EngineConfig, "deepspeed": DeepSpeedConfig},
        "tracker": {"jsonl": JsonlTracker, "wandb": WandbTracker, "tensorboard": TensorboardTracker},
        "method": {name: spec.options for name, spec in METHODS.items()},
    }


class UserFolder(SearchPathPlugin):
    """Makes Hydra's compose look into ``--config-dir`` too, after the shipped configs, as its flag does."""

    folder: str | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if UserFolder.folder is not None:
            search_path.append("command-line", f"file://{UserFolder.folder}")


@contextlib.contextmanager
def user_folder(folder: str | None) -> Iterator[None]:
    """While it lasts, configs are composed with the user's own folder of yaml files."""
    Plugins.instance().register(UserFolder)
    before, UserFolder.folder = UserFolder.folder, folder
    try:
        yield
    finally:
        UserFolder.folder = before


def register() -> None:
    """Store every schema with Hydra; call again after plugins were imported."""
    _register(tuple(variants()["router"]))


@cache
def _register(routers: tuple[str, ...]) -> None:
    store = ConfigStore.instance()
    store.store(name="_train", node=editable(TrainConfig))
    store.store(name="_verify", node=editable(VerifyConfig))
    store.store(name="_generate", node=editable(GenerateConfig))
    store.store(name="_convert", node=editable(ConvertConfig))
    store.store(name="_export", node=editable(ExportConfig))
    store.store(name="_eval", node=editable(EvalConfig))
    store.store(name="_upcycle", node=editable(UpcycleConfig))
    for group, classes in variants().items():
        for name, cls in classes.items():
            node = OmegaConf.structured(editable(cls))
            node[TAGS[group]] = name
            store.store(group=group, name=f"_{name}", node=node)
            if not (CONFIG_DIR / group / f"{name}.yaml").exists():  # a plugin's router ships no yaml
                store.store(group=group, name=name, node=node)


def class_of(group: str, tag: object) -> type:
    """The frozen class behind one option. UserError where the tag is unknown."""
    known = variants()[group]
    if not isinstance(tag, str) or tag not in known:
        hint = nearest(str(tag), known)
        plugin = (
            "; a plugin's router needs plugins=[package] on the command line" if group == "router" else ""
        )
        raise UserError(f"{group}.{TAGS[group]}={tag} is not known{hint}{plugin}")
    return known[tag]
