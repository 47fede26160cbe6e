"""The ``datasets`` library: imported when needed, and kept off the network while it reads local files."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moetrain.errors import UserError


def import_datasets(needed_for: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(f"{needed_for} needs the package datasets ({error}): pip install datasets") from error


@contextmanager
def offline_datasets(needed_for: str) -> Iterator[Any]:
    """``datasets`` with the hub switched off, for otherwise each load of a local file asks the hub first.

    ``HF_HUB_OFFLINE`` was read when the libraries were imported, so their constants are set as well. All of
    it is put back at the end, since another part of a mixture may read the hub. The library's error log is
    silenced: its errors reach the user once, as ours.
    """
    datasets = import_datasets(needed_for)
    constants: Any = importlib.import_module("huggingface_hub.constants")
    logging: Any = importlib.import_module("datasets.utils.logging")
    holders = (constants, datasets.config)
    flags = [getattr(holder, "HF_HUB_OFFLINE", False) for holder in holders]
    variable = os.environ.get("HF_HUB_OFFLINE")
    verbosity = logging.get_verbosity()
    os.environ["HF_HUB_OFFLINE"] = "1"
    for holder in holders:
        holder.HF_HUB_OFFLINE = True
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield datasets
    finally:
        logging.set_verbosity(verbosity)
        for holder, flag in zip(holders, flags, strict=True):
            holder.HF_HUB_OFFLINE = flag
        if variable is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = variable
