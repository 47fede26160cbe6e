"""Mixture-of-Experts layers: a router assigns tokens to experts, a dispatcher brings them there and back."""

from moetrain.moe.context import RouterContext
from moetrain.moe.layer import MoELayer
from moetrain.moe.routers import ROUTERS, Router, build_router
from moetrain.moe.routing import Routing, RoutingRecord

__all__ = ["ROUTERS", "MoELayer", "Router", "RouterContext", "Routing", "RoutingRecord", "build_router"]
