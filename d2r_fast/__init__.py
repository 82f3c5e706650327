"""d2r_fast: fast training of Dynamic Depth Routing (D2R), and its operations for use in other networks."""

from d2r_fast.config import NetConfig, SacConfig
from d2r_fast.network import GREEDY, RouteChoice, RoutedNetwork
from d2r_fast.ops import Routes, count_active, make_routes, routed_modules, select_routes, unpack_active
from d2r_fast.policy import Actor, Agent, Critics
from d2r_fast.published import load_published

__all__ = [
    "GREEDY",
    "Actor",
    "Agent",
    "Critics",
    "NetConfig",
    "RouteChoice",
    "RoutedNetwork",
    "Routes",
    "SacConfig",
    "count_active",
    "load_published",
    "make_routes",
    "routed_modules",
    "select_routes",
    "unpack_active",
]
