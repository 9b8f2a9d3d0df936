"""Weights, however they are stored: plain, sharded, quantised; and rounding into them."""

from __future__ import annotations

from torch import nn

from lightning_lora.naming import state_key
from lightning_lora.weights.quantized import FourBit, Int8, TorchAO
from lightning_lora.weights.sharded import Sharded, assign, full_states, full_tensors
from lightning_lora.weights.storage import Storage

__all__ = ["KINDS", "Storage", "assign", "full_states", "full_tensors", "read_only_weights", "storage_of", "storages"]

KINDS: tuple[type[Storage], ...] = (FourBit, Int8, TorchAO, Sharded, Storage)
"""Every way to store a weight; the first that ``stores`` it counts."""


def storage_of(module: nn.Module, parameter: str = "weight", root: nn.Module | None = None) -> Storage:
    """Return how ``module``, in the model ``root``, stores its ``parameter``."""
    return next(kind for kind in KINDS if kind.stores(module, parameter))(module, parameter, root)


def storages(root: nn.Module) -> dict[str, Storage]:
    """Return how the parameters in ``root`` are stored, by their keys in its state dict, under each of their names."""
    return {
        state_key(f"{path}.{name}".lstrip(".")): storage_of(module, name, root)
        for path, module in root.named_modules(remove_duplicate=False)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def read_only_weights(root: nn.Module) -> dict[str, Storage]:
    """Return those of :func:`storages` that are read only."""
    return {key: stored for key, stored in storages(root).items() if stored.read_only}
