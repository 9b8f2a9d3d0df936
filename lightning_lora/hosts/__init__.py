"""How a module carries adapters: under a class generated from its own, with A and B in its child ``lora``.

So ``isinstance`` holds, no key of the base model changes, no wrapper adds a level, and undoing it is one assignment.
"""

from lightning_lora.hosts.choose import (
    exact_forward,
    is_linear_like,
    is_transposed,
    layer_of,
    stacks,
    zero_factor,
)
from lightning_lora.hosts.host import Host, adopt, release

__all__ = [
    "Host",
    "adopt",
    "exact_forward",
    "is_linear_like",
    "is_transposed",
    "layer_of",
    "release",
    "stacks",
    "zero_factor",
]
