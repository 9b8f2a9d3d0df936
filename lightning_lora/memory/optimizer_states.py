"""What optimizers keep for their parameters: read from their states, or derived for parameters that they do not have.

The layout of a state is not written in its optimizer. It is found by one step of an optimizer of the same class and
options on small parameters: an entry of a parameter's size grows with it (moments), one whose sides are some of the
parameter's grows with these (the factors of Adafactor), one of a single element does not (a count of steps), and any
other grows with the number of elements (the scales of 8-bit blocks).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.memory.saved import nbytes, plain_tensors, tensors_in

Owner = tuple[Optimizer, Mapping[str, Any]]
"""An optimizer and one of its groups."""

EXACT = 2**12
"""Up to so many elements, the small parameter has the shape of the large one. From there on 8-bit optimizers pack."""


def owners(optimizers: Iterable[Optimizer]) -> dict[Tensor, Owner]:
    """Parameter -> the optimizer and the group that it is in."""
    return {
        p: (optimizer, group) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }


def measured_nbytes(optimizers: Iterable[Optimizer]) -> int:
    """Return the bytes of all tensors in the states of ``optimizers``."""
    return nbytes(tensor for optimizer in optimizers for tensor in tensors_in(optimizer.state))


def derived_nbytes(owned: Iterable[tuple[Tensor, Owner]]) -> int | None:
    """Return the bytes of the states that parameters would have with their owners, after a step.

    None if no optimizer like one of the owners can be made and stepped: its constructor wants more than is in its
    groups, or its step wants a closure, or other gradients than dense ones.
    """
    groups: dict[int, tuple[Owner, list[Tensor]]] = {}
    for parameter, owner in owned:
        groups.setdefault(id(owner[1]), (owner, []))[1].append(next(plain_tensors(parameter)))
    try:
        return sum(_after_a_step(*owner, parameters) for owner, parameters in groups.values())
    except Exception:  # whatever an optimizer raises that we do not know
        return None


def _after_a_step(optimizer: Optimizer, group: Mapping[str, Any], parameters: list[Tensor]) -> int:
    """Return the bytes of the states of ``parameters`` if they were in ``group`` of ``optimizer``."""
    kinds = [(_small_shape(tuple(p.shape)), p.dtype, p.device) for p in parameters]
    smalls = {kind: nn.Parameter(torch.ones(kind[0], dtype=kind[1], device=kind[2])) for kind in kinds}
    for small in smalls.values():
        small.grad = torch.ones_like(small)
    accepted = inspect.signature(type(optimizer).__init__).parameters
    options = {name: value for name, value in group.items() if name in accepted and name != "params"}
    other = type(optimizer)(list(smalls.values()), **options)
    other.step()
    return sum(
        _grown(entry, kind[0], tuple(parameter.shape))
        for parameter, kind in zip(parameters, kinds, strict=True)
        for entry in tensors_in(other.state[smalls[kind]])
    )


def _small_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sides that all differ, with a product that the blocks of 8-bit optimizers divide."""
    if math.prod(shape) <= EXACT:
        return shape
    side = {1: 2**14, 2: 64, 3: 16}.get(len(shape), 4)
    return tuple(side * (2 * i + 1) for i in range(len(shape)))


def _grown(entry: Tensor, small: tuple[int, ...], large: tuple[int, ...]) -> int:
    """Return the bytes that ``entry``, of a parameter of shape ``small``, has for one of shape ``large``."""
    size = nbytes([entry])
    if entry.numel() == 1:
        return size
    if entry.numel() != math.prod(small) and set(entry.shape) <= {1, *small}:
        sides = dict(zip(small, large, strict=True))
        return size * math.prod(sides.get(side, 1) for side in entry.shape) // entry.numel()
    return size * math.prod(large) // math.prod(small)
