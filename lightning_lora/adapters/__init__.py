"""What the increment of a weight is, a file for each decomposition, and where it starts."""

from lightning_lora.adapters.adapter import DECOMPOSITIONS, Adapter, AdapterState, full_adapters
from lightning_lora.adapters.additive import Additive
from lightning_lora.adapters.dora import DoRA
from lightning_lora.adapters.initial import INITS, is_init

__all__ = ["DECOMPOSITIONS", "INITS", "Adapter", "AdapterState", "Additive", "DoRA", "full_adapters", "is_init"]
