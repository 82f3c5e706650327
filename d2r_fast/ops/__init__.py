"""The operations of the method: choosing routes, running the routed modules, the linear layers around
them, and all of these as one."""

from d2r_fast.ops.ensemble_linear import ensemble_linear
from d2r_fast.ops.routed_modules import routed_modules
from d2r_fast.ops.routed_network import routed_network
from d2r_fast.ops.select_routes import Routes, count_active, make_routes, select_routes, unpack_active

__all__ = [
    "Routes",
    "count_active",
    "ensemble_linear",
    "make_routes",
    "routed_modules",
    "routed_network",
    "select_routes",
    "unpack_active",
]
