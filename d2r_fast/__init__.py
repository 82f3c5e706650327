"""d2r_fast: fast training of Dynamic Depth Routing (D2R), and its operations for use in other networks."""

from d2r_fast.config import SacConfig
from d2r_fast.nets.agent import Actor, Agent, Critics
from d2r_fast.nets.d2r import GREEDY, NetConfig, RouteChoice, RoutedNetwork
from d2r_fast.nets.published import load_published
from d2r_fast.ops import Routes, count_active, make_routes, routed_modules, select_routes, unpack_active

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
