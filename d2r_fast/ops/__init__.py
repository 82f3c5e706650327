"""The two operations of the method: choosing routes, and running the routed modules."""

from d2r_fast.ops.routed_modules import routed_modules
from d2r_fast.ops.select_routes import Routes, count_active, make_routes, select_routes, unpack_active

__all__ = ["Routes", "count_active", "make_routes", "routed_modules", "select_routes", "unpack_active"]
