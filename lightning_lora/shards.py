"""Parameters of which every process holds a part, as FSDP2's ``fully_shard`` leaves them.

All that is done here is done by all processes together, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

import torch
import torch.distributed as dist
from torch import Tensor, nn


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
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def part(tensor: Tensor) -> Tensor | None:
    """What this process holds of ``tensor``; None if that is all."""
    return tensor.detach().to_local() if is_part(tensor) else None  # type: ignore[attr-defined]


def reshard(module: nn.Module) -> None:
    """Frees what a forward without a backward has gathered, so that ``module`` has its sharded parameters again."""
    if not is_sharded(module):
        return
    from torch.distributed.fsdp import FSDPModule

    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


class Whole(MutableMapping[str, Tensor]):
    """A state of sharded tensors, whole for who reads or writes it: one at a time is gathered, to the CPU."""

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        self._parts = dict(parts)

    def __getitem__(self, key: str) -> Tensor:
        part = self._parts[key].detach()
        return (part.full_tensor() if is_part(part) else part).cpu()  # type: ignore[attr-defined]

    @torch.no_grad()
    def __setitem__(self, key: str, value: Tensor) -> None:
        """Into the tensor that is there."""
        part = self._parts[key]
        value = value.to(part.device, part.dtype)
        if is_part(part):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, part.device_mesh, part.placements)  # type: ignore[attr-defined]
        part.copy_(value)

    def __contains__(self, key: object) -> bool:
        return key in self._parts

    def __delitem__(self, key: str) -> None:
        del self._parts[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
