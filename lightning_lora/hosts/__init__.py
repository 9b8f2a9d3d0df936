"""How a module carries an adapter: as its child ``lora``, under a class made of a mixin and its own class.

So ``isinstance`` holds, no key of the base model changes, no wrapper adds a level, and undoing it is one assignment.
"""

from lightning_lora.hosts.choose import (
    SUPPORTED,
    is_linear_like,
    is_supported,
    is_transposed,
    layer_host,
    own_matrices,
    stacks,
    zero_factor,
)
from lightning_lora.hosts.host import Host
from lightning_lora.hosts.parameter import ParameterHost, read_names
from lightning_lora.hosts.swap import Swapped, swap, unswap
from lightning_lora.weights.quantized import storage_of

__all__ = [
    "SUPPORTED",
    "Host",
    "ParameterHost",
    "Swapped",
    "is_linear_like",
    "is_supported",
    "is_transposed",
    "layer_host",
    "own_matrices",
    "read_names",
    "stacks",
    "storage_of",
    "swap",
    "unswap",
    "zero_factor",
]
