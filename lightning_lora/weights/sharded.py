"""Parameters of which every process holds a part, as FSDP2's ``fully_shard`` leaves them.

All that is done here is done by all processes together, in the same order. Whole tensors are left as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer


def is_sharded(module: nn.Module) -> bool:
    """Whether ``module`` has parameters of which this process holds a part."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(child, FSDPModule) for child in module.modules()):  # whose parameters may stand unsharded
        return True
    return any(is_part(parameter) for parameter in module.parameters())


def is_part(tensor: Tensor) -> bool:
    """Whether ``tensor`` is spread over processes."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def part(tensor: Tensor) -> Tensor | None:
    """What this process holds of ``tensor``; None if that is all."""
    return tensor.detach().to_local() if is_part(tensor) else None  # type: ignore[attr-defined]


def rows(tensor: Tensor) -> slice | None:
    """Which rows of ``tensor``, along its first dimension, this process holds; None if it is not divided by rows."""
    spread: Any = tensor
    return _rows(spread.shape[0], spread.device_mesh, spread.placements)


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` with the parts of all processes, a copy; itself if it is whole."""
    if not is_part(tensor):
        return tensor
    held: Any = tensor.detach()  # which may have been moved to the CPU, where its processes do not meet
    return held.to(held.device_mesh.device_type).full_tensor().to(tensor.device, copy=True)


@torch.no_grad()
def write(tensor: Tensor, value: Tensor) -> None:
    """Writes ``value``, whole and the same everywhere, into ``tensor``, of which each process keeps its part."""
    tensor.copy_(_own(value.to(tensor.device, tensor.dtype), tensor) if is_part(tensor) else value)


def any_element(tensors: Iterable[Tensor]) -> bool:
    """Whether any element of ``tensors`` is not zero, in any process."""
    found = [bool((tensor if (own := part(tensor)) is None else own).any()) for tensor in tensors]
    anywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(anywhere, any(found))
    return any(anywhere)


def reshard(module: nn.Module) -> None:
    """Frees what a forward without a backward has gathered, so that ``module`` has its sharded parameters again."""
    if not is_sharded(module):
        return
    from torch.distributed.fsdp import FSDPModule

    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


class Whole(MutableMapping[str, Tensor]):
    """A state of sharded tensors, whole for who reads or writes it: one at a time is gathered, to the CPU.

    Args:
        parts: The state.
        in_place: Whether what is written goes into the tensors of ``parts``, instead of taking their place.
    """

    def __init__(self, parts: Mapping[str, Tensor], in_place: bool = False) -> None:
        self.parts = dict(parts)
        self._in_place = in_place

    def __getitem__(self, key: str) -> Tensor:
        return whole(self.parts[key].detach()).cpu()

    def __setitem__(self, key: str, value: Tensor) -> None:
        held = self.parts[key]
        target = held if self._in_place else torch.empty_like(held)
        write(target, value)
        self.parts[key] = target

    def __contains__(self, key: object) -> bool:
        return key in self.parts

    def __delitem__(self, key: str) -> None:
        del self.parts[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


@functools.cache
def _rows(length: int, mesh: Any, placements: tuple[Any, ...]) -> slice | None:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if any(placement not in (Replicate(), Shard(0)) for placement in placements):
        return None
    everywhere = DTensor.from_local(torch.arange(length), mesh, [Replicate()] * mesh.ndim, run_check=False)
    held = everywhere.redistribute(placements=placements).to_local().tolist()
    return slice(held[0], held[-1] + 1) if held else slice(length, length)


def _own(value: Tensor, like: Any) -> Any:
    """``value`` as ``like`` is spread; nothing is sent, since every process has all of it."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = DTensor.from_local(value.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements).to(like.device)


def makes_states(optimizer: Optimizer) -> bool:
    """Return whether a step of ``optimizer``, of sharded parameters, is how torch makes states to save or to load.

    All learning rates are zero then, and all gradients. All processes ask this together.
    """
    if any(group.get("lr", 0) != 0 for group in optimizer.param_groups):
        return False
    gradients = (p.grad for group in optimizer.param_groups for p in group["params"])
    return not any_element(gradient for gradient in gradients if gradient is not None)
