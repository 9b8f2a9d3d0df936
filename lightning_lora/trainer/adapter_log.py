"""Logs what the adapters have learned while a run goes on: scalars, and a picture for TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_lora.errors import LoRAError, warn
from lightning_lora.plots import draw, measure, of_module
from lightning_lora.trainer.namespaces import is_a

if TYPE_CHECKING:
    import lightning.pytorch as pl


class AdapterLog:
    """Logs |W - W0| / |W0| and the effective rank of each adapter, without waiting for the device.

    A picture needs the numbers on the host. They are copied there beside what the device does next, and drawn when the
    next ones are logged, or training ends.

    Args:
        every: After how many optimizer steps.
        trainer: Where it is, the first step counts from.
    """

    def __init__(self, every: int, trainer: pl.Trainer) -> None:
        self._every = every
        self._last = trainer.global_step
        self._frozen: dict[str, Tensor] = {}
        """Norms of the W0 that stay as they are."""
        self._copied: tuple[int, list[str], Tensor, Any] | None = None
        """The step, names and numbers of the next picture, and the event after which the numbers are there."""
        rows: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.loggers and every % rows:
            warn(
                f"`log_adapters_every_n_steps={every}`, and Lightning writes rows at multiples of"
                f" `log_every_n_steps={rows}` alone. Give the callback a multiple of that, or the Trainer a divisor."
            )

    def log(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log after a batch, if it is time; all processes call this together."""
        step, last = trainer.global_step, self._last
        if step // self._every == last // self._every:
            return
        self._last = step
        found = measure(of_module(module), frozen=self._frozen)
        numbers = {"relative_norm": found.relative_norm, "effective_rank": found.effective_rank}
        for what, column in numbers.items():
            values = zip(found.names, column.unbind(), strict=True)
            module.log_dict({f"lora/{what}/{name}": value for name, value in values}, on_step=True, on_epoch=False)
        self.draw(trainer)
        if self._loggers(trainer):
            both = torch.stack(list(numbers.values()))
            copy = both.to("cpu", non_blocking=both.is_cuda)
            copied = torch.cuda.current_stream(both.device).record_event() if both.is_cuda else None
            self._copied = step, found.names, copy, copied

    def draw(self, trainer: pl.Trainer) -> None:
        """Give TensorBoard the picture of the numbers that were copied last."""
        if self._copied is None:
            return
        (step, names, numbers, copied), self._copied = self._copied, None
        if copied is not None:
            copied.synchronize()  # of a copy that ended long ago
        try:
            figure = draw(names, *numbers.tolist())
        except LoRAError as error:
            warn(f"TensorBoard gets no picture of the adapters. {error}")
            return
        for logger in self._loggers(trainer):
            logger.experiment.add_figure("lora/adapters", figure, step)

    def _loggers(self, trainer: pl.Trainer) -> list[Any]:
        loggers = trainer.loggers if trainer.is_global_zero else []
        return [logger for logger in loggers if is_a(logger, TensorBoardLogger)]
