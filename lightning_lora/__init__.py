"""LoRA for PyTorch Lightning by adding one callback."""

from lightning_lora.adapters import Adapter
from lightning_lora.callback import LoRA
from lightning_lora.checkpoint.peft import load_peft, save_peft
from lightning_lora.injection.inject import (
    adapters,
    disabled,
    inject,
    merge,
    merged,
    merged_state_dict,
    merging_errors,
)
from lightning_lora.memory.estimate import estimate_memory
from lightning_lora.memory.report import Memory, MemoryReport
from lightning_lora.steps.attach import attach

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "LoRA",
    "Memory",
    "MemoryReport",
    "adapters",
    "attach",
    "disabled",
    "estimate_memory",
    "inject",
    "load_peft",
    "merge",
    "merged",
    "merged_state_dict",
    "merging_errors",
    "save_peft",
]
