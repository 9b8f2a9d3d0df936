"""What all backward passes share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def without_autocast(backward: Callable[[Any, Tensor], tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Have the forward's dtypes hold in its backward, also where that is called under autocast."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        device = dy.device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, dy)
        with torch.autocast(device, enabled=False):
            return backward(ctx, dy)

    return wrapped
