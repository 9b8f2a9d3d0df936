"""How a module carries an adapter: as its child ``lora``, under a class made of a mixin and its own class.

So ``isinstance`` holds, no key of the base model changes, no wrapper adds a level, and undoing it is one assignment.
"""

from lightning_lora.hosts.linear import LinearHost, host_mixin, is_linear_like
from lightning_lora.hosts.swap import Swapped, swap, unswap

__all__ = ["LinearHost", "Swapped", "host_mixin", "is_linear_like", "swap", "unswap"]
