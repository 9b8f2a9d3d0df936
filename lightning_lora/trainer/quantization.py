"""Layers that Lightning or bitsandbytes quantise while a run is set up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.strategies import DDPStrategy

from lightning_lora.errors import LoRAError
from lightning_lora.injection.inject import adapters
from lightning_lora.trainer.namespaces import is_a
from lightning_lora.weights import read_only_weights
from lightning_lora.weights.quantized import TorchAO, quantize

if TYPE_CHECKING:
    import lightning.pytorch as pl


def quantize_now(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Do now what Lightning and bitsandbytes do a moment later, so that adapters go into layers that stay.

    The precision plugin puts other modules in the place of Linears, and what is moved to its device for the first time
    is quantised there; a checkpoint is read in between, and its W0 is recognised by what is stored of it.
    """
    plugin: Any = trainer.precision_plugin
    if is_a(plugin, BitsandbytesPrecision):
        if not read_only_weights(pl_module) and (present := adapters(pl_module)):
            raise LoRAError(
                f"{next(iter(present))!r} has an adapter already, and BitsandbytesPrecision would put a layer without"
                " one in its place. Leave the injection to the callback, or make the layers in `configure_model`, where"
                " they are quantised as they are made."
            )
        plugin.convert_module(pl_module)
    if is_a(trainer.strategy, DDPStrategy):
        for key, stored in read_only_weights(pl_module).items():
            if isinstance(stored, TorchAO):
                raise LoRAError(
                    f"{key!r} is a {stored.name} of torchao, which torch's DistributedDataParallel cannot send to other"
                    " processes. Use one device, or quantise by bitsandbytes."
                )
    quantize(read_only_weights(pl_module).values(), trainer.strategy.root_device)
