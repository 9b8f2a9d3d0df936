"""Private names of torch and Lightning that this package uses, in one place, each with a fallback or a clear error."""

from __future__ import annotations

from typing import Any

from lightning_lora.errors import LoRAError


def logs_hyperparameters(module: Any) -> bool:
    """Return whether a LightningModule lets its hyperparameters be logged: ``save_hyperparameters(logger=False)``."""
    return getattr(module, "_log_hyperparams", True) is not False


def average_model(callback: Any) -> Any:
    """Return the ``AveragedModel`` of Lightning's ``WeightAveraging``."""
    model = getattr(callback, "_average_model", None)
    if model is None:
        raise LoRAError(
            f"This version of Lightning keeps the average of {type(callback).__name__} elsewhere. Remove the callback,"
            " or report this with your version of Lightning."
        )
    return model


def combined_loader_mode(trainer: Any) -> Any:
    """Return how the fit loop combines several loaders; Lightning's default where it does not tell."""
    return getattr(getattr(trainer.fit_loop, "_combined_loader", None), "_mode", "max_size_cycle")
