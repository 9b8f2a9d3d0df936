"""One weight of a module: as a plain tensor here, and what each other way to store it overrides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.weights.digest import fingerprint, seen


class Storage:
    """A weight that is a plain tensor.

    Args:
        module: The module that has the weight.
        parameter: Its name there.
        root: The model around ``module``.
    """

    name: str = "plain"
    read_only: ClassVar[bool] = False
    """Whether the weight can neither hold an increment nor have a gradient, and only its layer computes with it."""

    def __init__(self, module: nn.Module, parameter: str = "weight", root: nn.Module | None = None) -> None:
        self.module, self.parameter, self.root = module, parameter, root

    @classmethod
    def stores(cls, module: nn.Module, parameter: str) -> bool:
        """Return whether ``parameter`` of ``module`` is stored in this way."""
        return True

    @property
    def weight(self) -> Any:
        """What stands in the place of the weight."""
        return self.module._parameters[self.parameter]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the plain weight."""
        return self.weight.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the plain weight."""
        return tuple(self.weight.shape)

    def trouble(self) -> str | None:
        """Say why the weight cannot get an adapter, where it cannot: what follows "The weight of x"."""
        return None

    def tensors(self) -> list[Tensor]:
        """Return all that this process stores of the weight."""
        return [self.weight.data]

    def full(self) -> Tensor:
        """Return the full plain tensor, the weight itself or a copy. Of a shard, all ranks call this together."""
        return self.weight

    @torch.no_grad()
    def assign(self, value: Tensor) -> None:
        """Write ``value``, of the shape of the plain weight and the same on all ranks."""
        self.weight.copy_(value)

    def add_step(self, step: Callable[[Tensor, slice | None], None], by_rows: bool) -> None:
        """Have ``step`` change the weight in place.

        Args:
            step: Takes a tensor, and which rows of the full weight that is; None for all.
            by_rows: Whether it can take some rows without the others.
        """
        step(self.weight, None)

    def misfit(self, value: Tensor) -> str | None:
        """Say why ``value``, from a state dict, cannot be copied into the weight, where torch would not say it."""
        return None

    def seen(self) -> tuple[Any, ...]:
        """Return what changes when the weight is written to."""
        return seen(self.weight)

    def fingerprint(self) -> str:
        """Return what tells the frozen weight from others, wherever it is."""
        return fingerprint(self.full())

    def has(self, expected: str) -> bool:
        """Return whether ``expected`` is the fingerprint of the weight."""
        return self.fingerprint() == expected
