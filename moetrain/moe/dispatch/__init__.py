"""How tokens reach their experts and return: on one process, or over ranks."""

from moetrain.moe.dispatch.base import Dispatcher, ExpertRows, Work
from moetrain.moe.dispatch.local import LocalDispatcher

__all__ = ["Dispatcher", "ExpertRows", "LocalDispatcher", "Work"]
