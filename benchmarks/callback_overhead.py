"""What the callback's own hooks take for each training step of a module with 200 adapted layers.

    python benchmarks/callback_overhead.py

The hooks are timed where Lightning calls them, in a real run: those of the steps after the first.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRA


class Layers(LightningModule):
    """200 small Linears, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(200)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class TimedLoRA(LoRA):
    """Adds up the time of every hook that runs once a step or more often."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seconds: list[float] = []

    def _timed(self, hook: Any, *args: Any) -> None:
        start = time.perf_counter()
        hook(*args)
        self.seconds[-1] += time.perf_counter() - start

    def on_train_batch_start(self, *args: Any) -> None:
        self.seconds.append(0.0)
        self._timed(super().on_train_batch_start, *args)

    def on_after_backward(self, *args: Any) -> None:
        self._timed(super().on_after_backward, *args)

    def on_before_optimizer_step(self, *args: Any) -> None:
        self._timed(super().on_before_optimizer_step, *args)

    def on_train_batch_end(self, *args: Any) -> None:
        self._timed(super().on_train_batch_end, *args)


def main() -> None:
    lora = TimedLoRA(rank=8)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_steps=200, accelerator="cpu", callbacks=[lora], enable_model_summary=False, **quiet).fit(
        Layers(), DataLoader(torch.randn(800, 16), batch_size=4)
    )
    low, middle, high = (1000 * quantile for quantile in statistics.quantiles(lora.seconds[1:], n=4))
    print(f"first step {1000 * lora.seconds[0]:.3f} ms; later steps {middle:.4f} ms [{low:.4f}, {high:.4f}]")


if __name__ == "__main__":
    main()
