"""Tells whether a weight is the one that was frozen when a file was written, and whether it has been written to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_lora.weights.digest import digest, sample
from lightning_lora.weights.quantized import Storage


def fingerprint(weight: Tensor) -> str:
    """Return the dtype, shape and SHA-256 of ``weight``, as ``"float32:64x32:9f86..."``."""
    dtype, shape = str(weight.dtype).removeprefix("torch."), "x".join(map(str, weight.shape))
    return f"{dtype}:{shape}:{digest(weight)}"


def seen(weight: Tensor) -> tuple[Any, ...]:
    """Return what changes when ``weight`` is written to: its address, its version, and a sample of its entries.

    ``weight.data.clamp_()`` and the like move no version counter; the sample, evenly spaced, notices those that touch
    most entries.
    """
    if type(weight.data) is not Tensor:  # quantised or sharded
        return id(weight), weight._version
    return weight.data_ptr(), weight._version, sample(weight)


class Fingerprints:
    """Fingerprints of frozen weights, each computed once for as long as its weight is not written to."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[Any, ...], str]] = {}
        self.rewritten: set[str] = set()
        """Keys of weights that were written to between two readings."""

    def of(
        self, key: str, weight: Tensor, full: Callable[[], Tensor] | None = None, stored: Storage | None = None
    ) -> str:
        """Return the fingerprint of the weight whose key in the state dict is ``key``.

        Args:
            key: Of the weight in the state dict.
            weight: The weight, or this rank's shard of it.
            full: Gathers the full tensor of a shard, on all ranks together.
            stored: How a quantised weight is stored; its fingerprint is that of the stored tensors.
        """
        held = weight if stored is None else stored.tensors()[0]
        # a shard's entries are looked at by its rank alone, and gathering is for all ranks or none
        now = (held.data_ptr(), held._version, "full") if full is not None else seen(held)
        known = self._known.get(key)
        if known is None or known[0] != now:
            value = stored.fingerprint() if stored is not None else fingerprint(weight if full is None else full())
            if known is not None and known[1] != value:
                self.rewritten.add(key)
            self._known[key] = now, value
        return self._known[key][1]
