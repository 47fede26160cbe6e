"""``moetrain router``: a table of the routers there are, and checks for one of your own."""

from moetrain.router_tools.check import CHECKS, Outcome, check_router
from moetrain.router_tools.command import router_command

__all__ = ["CHECKS", "Outcome", "check_router", "router_command"]
