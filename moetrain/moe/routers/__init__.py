"""Routers by name. Importing a router's module registers it."""

from moetrain.moe.routers import topk as topk
from moetrain.moe.routers.base import ROUTERS, Router, RouterSpec, build_router, register

__all__ = ["ROUTERS", "Router", "RouterSpec", "build_router", "register"]
