"""The operations as modules with weights, for networks of one's own."""

from d2r_fast.nn.routed_modules import RoutedModules

__all__ = ["RoutedModules"]
