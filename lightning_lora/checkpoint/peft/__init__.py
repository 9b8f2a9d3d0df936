"""Adapters in the files of PEFT, ``adapter_model.safetensors`` and ``adapter_config.json``: written, and read back."""

from lightning_lora.checkpoint.peft.load import FROM_FILES, check_beside_files, load, load_peft
from lightning_lora.checkpoint.peft.save import save_peft

__all__ = ["FROM_FILES", "check_beside_files", "load", "load_peft", "save_peft"]
