"""Linears whose weight is stored quantised, by bitsandbytes or torchao."""

from __future__ import annotations

from typing import Any, cast

from lightning_lora.hosts.linear import LinearHost
from lightning_lora.weights.quantized import Storage, form, storage_of


class QuantizedLinearHost(LinearHost):
    """A Linear whose weight is stored quantised: its own kernels, and the increment beside them."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A plain weight would be copied into what is stored, entry by entry, and cut off to whole numbers."""
        stored, given = cast(Storage, storage_of(self)), state_dict.get(f"{prefix}weight")
        if given is not None and stored.packed and form(given) != form(stored.weight):
            args[-1].append(
                f"{prefix}weight is {given.dtype} in the shape {tuple(given.shape)}, and the module stores it quantised"
                f" ({stored.name}). Load it into the plain module, and quantise that."
            )
            state_dict = {key: value for key, value in state_dict.items() if key != f"{prefix}weight"}
        super()._load_from_state_dict(state_dict, prefix, *args)
