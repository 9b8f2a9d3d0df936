"""LoRA for PyTorch Lightning by adding one callback."""

from lightning_lora._version import __version__
from lightning_lora.adapters import Adapter
from lightning_lora.callback import LoRA
from lightning_lora.checkpoint.load import combine_adapters, load_adapter, set_adapter
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
from lightning_lora.plots import adapter_table, plot_adapters
from lightning_lora.steps.attach import attach

__all__ = [
    "Adapter",
    "LoRA",
    "Memory",
    "MemoryReport",
    "__version__",
    "adapter_table",
    "adapters",
    "attach",
    "combine_adapters",
    "disabled",
    "estimate_memory",
    "inject",
    "load_adapter",
    "load_peft",
    "merge",
    "merged",
    "merged_state_dict",
    "merging_errors",
    "plot_adapters",
    "save_peft",
    "set_adapter",
]
