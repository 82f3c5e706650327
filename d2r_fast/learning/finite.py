"""Finding NaN and infinity in what a run holds."""

from collections.abc import Mapping

import torch
from torch import Tensor


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """ "NAME[2, 5] is nan" of the first tensor, all on one device, that holds NaN or infinity; None if none does.

    Reads each tensor once, copies none, and waits for the device once. Integers are finite.
    """
    floats = {name: value.detach() for name, value in tensors.items() if value.is_floating_point() and value.numel()}
    if not floats:
        return None
    extremes = torch.stack([torch.stack(value.aminmax()).double() for value in floats.values()])  # NaN if one is
    for (name, value), finite in zip(floats.items(), extremes.isfinite().all(1).tolist(), strict=True):
        if not finite:
            place = (~value.isfinite()).nonzero()[0].tolist()
            return f"{name}{place if place else ''} is {value[tuple(place)].item()}"
    return None
