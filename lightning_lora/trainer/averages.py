"""Averages of the weights: Lightning's ``WeightAveraging`` and ``EMAWeightAveraging`` beside LoRA.

In factored mode A and B are averaged, as everyone who takes the moving average of a LoRA does, and W0 is its own
average. The callback makes its copy of the module in ``setup``, before there are adapters, so it is asked to make it
again. Files then have the merged average in ``state_dict``, where that callback keeps it.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_lora._compat import average_model
from lightning_lora.adapters import AdapterState
from lightning_lora.checkpoint import read, write
from lightning_lora.checkpoint.format import KEY, NOTICE, SavedRun
from lightning_lora.errors import LoRAError
from lightning_lora.hosts.view import present_merged
from lightning_lora.injection.inject import adapters, places
from lightning_lora.injection.options import Options
from lightning_lora.trainer.instance_hooks import InstanceHooks
from lightning_lora.trainer.namespaces import WEIGHT_AVERAGING, is_a

if TYPE_CHECKING:
    import lightning.pytorch as pl

CURRENT = "current_model_state"
"""Where the callback keeps the state dict of the module beside that of the average."""


class Averages:
    """The weight averaging callback of a Trainer, or none.

    Args:
        trainer: Its callbacks are looked through.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        found = [c for c in trainer.callbacks if is_a(c, *WEIGHT_AVERAGING)]  # type: ignore[attr-defined]
        self._callback: Any = found[0] if found and trainer.state.fn == "fit" else None
        self._saved: dict[str, AdapterState] = {}
        """Adapters of the average in the file that is being loaded."""

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, options: Options) -> None:
        """Have the callback copy ``module`` again, which has its adapters now.

        Raises:
            LoRAError: If the weights hold their increments: an average of A and B would not be theirs.
        """
        if self._callback is None:
            return
        if options.gradient != "factored":
            raise LoRAError(
                f"{type(self._callback).__name__} averages and exchanges A, B and weights outside of the optimizer's"
                f" step, and with `gradient={options.gradient!r}` weights follow A and B at each step. Use"
                " `gradient='factored'`, in which A and B alone are averaged."
            )
        with warnings.catch_warnings():  # of what it has warned before
            warnings.simplefilter("ignore")
            self._callback.setup(trainer, module, "fit")
        average = self._average()
        present_merged(average.module, True)

        def keep_frozen(update: Any, current: nn.Module, *args: Any, **kwargs: Any) -> None:
            """Leave W0 as it is, bit for bit: some averages round, and evaluation would write that back."""
            update(current, *args, **kwargs)
            with torch.no_grad():
                for mine, theirs in zip(average.module.parameters(), current.parameters(), strict=True):
                    if not theirs.requires_grad:
                        mine.copy_(theirs)

        InstanceHooks(average).wrap("update_parameters", keep_frozen)

    def _average(self) -> Any:
        return average_model(self._callback)

    def save(self, checkpoint: dict[str, Any], run: SavedRun, module: nn.Module) -> SavedRun:
        """Make the state dicts in ``checkpoint`` plain, and return ``run`` with the adapters of the average."""
        if self._callback is None or CURRENT not in checkpoint:
            write.make_plain(checkpoint["state_dict"], run, module)
            return run
        average = self._average().module
        write.make_plain(checkpoint["state_dict"], run, average)
        write.make_plain(checkpoint[CURRENT], run, module)
        found = {place.name: place for place in places(average)}
        states = {name: place.adapter.state(place.weight).detached() for name, place in found.items()}
        return dataclasses.replace(run, average=states)

    def prepare_for_loading(
        self, checkpoint: dict[str, Any], module: nn.Module, exact: bool, after_fit: SavedRun | None
    ) -> SavedRun | None:
        """Prepare ``checkpoint`` for :func:`read.prepare_for_loading`'s purpose, both of its state dicts."""
        payload, averaged = checkpoint.get(KEY), checkpoint.get("state_dict")
        has_both = isinstance(payload, dict) and "average" in payload and CURRENT in checkpoint
        if not has_both or not isinstance(averaged, dict) or not adapters(module):
            return read.prepare_for_loading(checkpoint, module, exact, after_fit)
        checkpoint["state_dict"] = checkpoint[CURRENT]
        run = read.prepare_for_loading(checkpoint, module, exact, after_fit)
        if self._callback is not None and run is not None and run.average is not None:
            checkpoint[CURRENT] = current = checkpoint["state_dict"]
            frozen = {place.key: current[place.key] for place in places(module) if place.key in current}
            checkpoint["state_dict"] = {**current, **averaged, **frozen}  # a file of adapters lacks what is frozen
            checkpoint["state_dict"].pop(NOTICE, None)
            self._saved = run.average
        return run

    def restore(self) -> None:
        """Give the average its adapters, after the callback has loaded its weights."""
        if self._saved:
            read.restore_adapters(self._average().module, self._saved)
            self._saved = {}
