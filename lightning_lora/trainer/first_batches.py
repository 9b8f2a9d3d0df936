"""The losses of a run's first batches, before it begins and without a trace."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_lora._compat import combined_loader_mode
from lightning_lora.errors import LoRAError

FEWEST = 4
"""Batches, where a step accumulates fewer."""


def first_losses(trainer: pl.Trainer, pl_module: pl.LightningModule, passes: int) -> Callable[[], Iterator[Tensor]]:
    """Return a function that yields the losses of the batches of the first optimizer step, at least 4, at each call.

    Raises:
        LoRAError: If the module optimizes by itself, so that its ``training_step`` takes steps.
    """
    if not pl_module.automatic_optimization:
        raise LoRAError(
            "`init='gradient'` calls `training_step` before training, and with manual optimization that would take"
            " optimizer steps. Use another `init`."
        )
    batches = _first_batches(trainer, max(FEWEST, trainer.accumulate_grad_batches))
    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    bar = Tqdm(total=passes * len(batches), desc="Gradients at the start", disable=not shown, leave=False)

    def losses() -> Iterator[Tensor]:
        with _without_trace(pl_module):
            for index, batch in enumerate(batches):
                on_device = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
                arguments = [on_device]
                if is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2):
                    arguments.append(index)
                with trainer.precision_plugin.train_step_context():
                    output = pl_module.training_step(*arguments)
                bar.update()
                loss = output.get("loss") if isinstance(output, Mapping) else output
                if isinstance(loss, Tensor):
                    yield loss
        if bar.n == bar.total:
            bar.close()

    return losses


def _first_batches(trainer: pl.Trainer, count: int) -> list[Any]:
    """Read batches from iterators of their own; the loaders are left as they were."""
    combined = CombinedLoader(trainer.train_dataloader, combined_loader_mode(trainer))
    with isolate_rng(), ExitStack() as kept:
        for loader in combined.flattened:
            kept.enter_context(_kept(loader))
        combined.flattened = [_apart(loader) for loader in combined.flattened]
        return [batch for batch, _, _ in itertools.islice(iter(combined), count)]


def _apart(loader: Any) -> Any:
    """Return ``loader`` with an iterator of its own: that of persistent workers is in use."""
    if isinstance(loader, DataLoader):
        loader = copy.copy(loader)
        loader._iterator = None
    return loader


@contextmanager
def _kept(loader: Any) -> Iterator[None]:
    """Put back, on leaving, the state of ``loader`` and of its random generators."""
    owners = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    generators = [owner.generator for owner in owners if isinstance(getattr(owner, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in generators]
    state = copy.deepcopy(loader.state_dict()) if hasattr(loader, "load_state_dict") else None
    yield
    if state is not None:
        loader.load_state_dict(state)
    for generator, of_generator in zip(generators, states, strict=True):
        generator.set_state(of_generator)


@contextmanager
def _without_trace(pl_module: pl.LightningModule) -> Iterator[None]:
    """Put back, on leaving, buffers, metrics and random generators; inside, random numbers are alike each time."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in pl_module.buffers()]
    metrics = [metric for metric in pl_module.modules() if isinstance(metric, Metric)]
    states = [(copy.deepcopy(metric.metric_state), metric._update_count, metric._computed) for metric in metrics]
    with isolate_rng():
        torch.manual_seed(0)
        yield
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    for metric, (state, count, computed) in zip(metrics, states, strict=True):
        vars(metric).update(state, _update_count=count, _computed=computed)
