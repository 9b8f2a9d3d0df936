"""Parameters of which every process holds a part, as FSDP2's ``fully_shard`` leaves them.

All that is done here is done by all processes together, in the same order. Plain tensors are left as they are.
"""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import Optimizer

from lightning_lora.weights.storage import Storage


class Sharded(Storage):
    """A weight that is a DTensor."""

    name = "sharded"

    @classmethod
    def stores(cls, module: nn.Module, parameter: str) -> bool:
        weight = module._parameters.get(parameter)
        return weight is not None and is_shard(weight)

    def trouble(self) -> str | None:
        return (
            "is sharded already, and an adapter has to be sharded with it. Call `lightning_lora.inject` in"
            " `configure_model`, with the options of the callback, before `fully_shard`"
        )

    def tensors(self) -> list[Tensor]:
        return [self.weight.detach().to_local()]

    def full(self) -> Tensor:
        return full_tensors([self.weight.detach()])[0]

    @torch.no_grad()
    def assign(self, value: Tensor) -> None:
        assign(self.weight, value)

    def add_step(self, step: Callable[[Tensor, slice | None], None], by_rows: bool) -> None:
        """Have each rank change the rows that it holds; where one row needs the others, gather the weight."""
        if by_rows and (rows := _rows(self.weight)) is not None:
            step(self.weight.detach().to_local(), rows)
        else:
            full = self.full()
            step(full, None)
            self.assign(full)

    def seen(self) -> tuple[Any, ...]:
        """No entries, which each rank would judge by itself: gathering is for all ranks or none."""
        (local,) = self.tensors()
        return local.data_ptr(), local._version


def is_shard(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is spread over processes."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_sharded(module: nn.Module) -> bool:
    """Return whether ``module`` has parameters of which this process holds a part."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(child, FSDPModule) for child in module.modules()):  # whose parameters may stand unsharded
        return True
    return any(is_shard(parameter) for parameter in module.parameters())


@torch.no_grad()
def full_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return ``tensors`` with the parts of all processes, gathered together; plain ones are returned themselves.

    It takes one collective for all that are divided by rows in one way and have one dtype. Each process has the same
    number of rows of a tensor, or fewer at the end: filled up to that number, what it holds of all of them is one row
    of a matrix, which is gathered, and in whose columns the rows of a tensor follow one another.
    """
    result = list(tensors)
    groups: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if is_shard(tensor):
            shard: Any = tensor
            alike = shard.device_mesh, shard.placements, shard.dtype, shard.device
            groups.setdefault(i if _dimension(tensor) is None else alike, []).append(i)
    for members in groups.values():
        shards: list[Any] = [tensors[i] for i in members]
        if len(members) == 1:
            result[members[0]] = _gather(shards[0])
            continue
        from torch.distributed.tensor import DTensor

        mesh, placements, dimension = shards[0].device_mesh, shards[0].placements, cast(int, _dimension(shards[0]))
        filled = []
        for shard in shards:
            each = -(-shard.shape[0] // mesh.size(dimension)) * math.prod(shard.shape[1:])
            local = shard.to_local().flatten()
            filled.append(pad(local, (0, each - local.numel())))
        matrix = _gather(DTensor.from_local(torch.cat(filled)[None], mesh, placements, run_check=False))
        columns = matrix.split([local.numel() for local in filled], dim=1)
        for i, shard, rows in zip(members, shards, columns, strict=True):
            result[i] = rows.reshape(-1, *shard.shape[1:])[: shard.shape[0]].to(shard.device)
    return result


def full_states(states: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return ``states`` with full tensors, which are gathered together."""
    full = iter(full_tensors([tensor for state in states for tensor in state.values()]))
    return [{name: next(full) for name in state} for state in states]


@torch.no_grad()
def assign(tensor: Tensor, value: Tensor) -> None:
    """Write ``value``, full and the same on all ranks, into ``tensor``, of which each rank keeps its part."""
    if not is_shard(tensor) or is_shard(value):
        tensor.copy_(value)
        return
    from torch.distributed.tensor import DTensor, Replicate

    shard: Any = tensor
    value, mesh = value.detach().to(tensor.device, tensor.dtype), shard.device_mesh
    everywhere = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)  # nothing is sent
    tensor.copy_(everywhere.redistribute(placements=shard.placements).to(tensor.device))


def reshard(module: nn.Module) -> None:
    """Free what a forward without a backward has gathered, so that ``module`` has its sharded parameters again."""
    if not is_sharded(module):
        return
    from torch.distributed.fsdp import FSDPModule

    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


class FullState(UserDict[str, Tensor]):
    """A state of sharded tensors, full for who reads or writes it: one at a time is gathered, to the CPU.

    Args:
        shards: The state.
        in_place: Whether what is written goes into the tensors of ``shards``, instead of taking their place.
    """

    def __init__(self, shards: Mapping[str, Tensor], in_place: bool = False) -> None:
        self.data = dict(shards)
        self._in_place = in_place

    def __getitem__(self, key: str) -> Tensor:
        return full_tensors([self.data[key].detach()])[0].cpu()

    def __setitem__(self, key: str, value: Tensor) -> None:
        if not self._in_place:
            self.data[key] = torch.empty_like(self.data[key])
        assign(self.data[key], value)


def makes_states(optimizer: Optimizer) -> bool:
    """Return whether a step of ``optimizer``, of sharded parameters, is how torch makes states to save or to load.

    All learning rates are zero then, and all gradients. All processes ask this together.
    """
    if not dist.is_available() or not dist.is_initialized():
        return False
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(map(is_shard, parameters)) or any(group.get("lr", 0) != 0 for group in optimizer.param_groups):
        return False
    return not _any_element(p.grad for p in parameters if p.grad is not None)


def _any_element(tensors: Iterable[Tensor]) -> bool:
    """Return whether any element of ``tensors`` is not zero, in any process."""
    found = [bool((tensor.to_local() if is_shard(tensor) else tensor).any()) for tensor in tensors]  # type: ignore[attr-defined]
    anywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(anywhere, any(found))
    return any(anywhere)


def _gather(shard: Any) -> Tensor:
    """Return a copy of the full tensor; a shard on the CPU may be one of processes that meet on their accelerators."""
    return shard.to(shard.device_mesh.device_type).full_tensor().to(shard.device, copy=True)


def _dimension(shard: Any) -> int | None:
    """Along which dimension of its mesh ``shard`` is divided by rows; None if it is divided otherwise."""
    from torch.distributed.tensor import Replicate, Shard

    divided = [i for i, placement in enumerate(shard.placements) if not isinstance(placement, Replicate)]
    kinds = [(type(shard.placements[i]), getattr(shard.placements[i], "dim", None)) for i in divided]
    return divided[0] if kinds == [(Shard, 0)] else None


def _rows(shard: Any) -> slice | None:
    """Return which rows of ``shard`` this process holds; None if it is not divided by rows."""
    if (dimension := _dimension(shard)) is None:
        return None
    length, mesh = shard.shape[0], shard.device_mesh
    each = -(-length // mesh.size(dimension))
    first = min(mesh.get_local_rank(dimension) * each, length)
    return slice(first, min(first + each, length))
