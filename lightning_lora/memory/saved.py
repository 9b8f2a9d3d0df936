"""Counts the bytes of tensors, and of what autograd keeps of them from a forward to its backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield what ``tensor`` is stored in: itself, the shard of a DTensor, the packed parts of a quantised tensor."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        if isinstance(part := getattr(tensor, name), Tensor):  # a DTensor names its mesh too
            yield from plain_tensors(part)


def storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Return the storages of ``tensors`` by address. Lazy parameters have none yet."""
    present = (tensor for tensor in tensors if not is_lazy(tensor))
    found = (plain.untyped_storage() for tensor in present for plain in plain_tensors(tensor))
    return {storage._cdata: storage for storage in found}


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that ``tensors`` take, each storage counted once."""
    return sum(storage.nbytes() for storage in storages(tensors).values())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in mappings, lists and tuples, at any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def leaves(roots: Iterable[Tensor]) -> set[int]:
    """Return the identities of the leaves in the graph of ``roots``."""
    nodes = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen, found = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        new = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= new
        nodes.extend(new)
    return found


class Held:
    """One tensor that is saved for a backward, for as long as autograd keeps it."""

    def __init__(self, tensor: Tensor, beside: Any = None) -> None:
        self.tensor = tensor
        self.beside = beside
        """What is kept for as long."""


class Saved:
    """Counts what is saved for a backward: when the backward asks for the first of it, all of it still stands.

    What the user's own hooks save instead (``save_on_cpu``, activation checkpoints) is theirs, and is not seen.

    Args:
        ignored: Gives the tensors that do not count, parameters and buffers.
    """

    def __init__(self, ignored: Callable[[], Iterable[Tensor]]) -> None:
        self.most = 0
        """Bytes, of each storage once."""
        self._ignored = ignored
        self._held: weakref.WeakSet[Held] = weakref.WeakSet()
        self.grown = False
        """Whether more has been saved since the last measurement."""

    def hold(self, tensor: Tensor) -> Held:
        """Save ``tensor``."""
        held = Held(tensor)
        self._held.add(held)
        self.grown = True
        return held

    def give(self, held: Held) -> Tensor:
        """Return what was saved."""
        if self.grown:
            self.measure()
        return held.tensor

    def measure(self) -> None:
        """Add up what stands now."""
        standing, ignored = storages(held.tensor for held in self._held), storages(self._ignored())
        self.most = max(self.most, sum(storage.nbytes() for key, storage in standing.items() if key not in ignored))
        self.grown = False
