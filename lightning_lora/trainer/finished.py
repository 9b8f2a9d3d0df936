"""What it takes to go on with a run whose module is plain and merged again."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.checkpoint import write
from lightning_lora.checkpoint.format import KEY, SavedRun
from lightning_lora.weights.digest import seen


class Finished:
    """What it takes to resume a run whose module is plain and merged again."""

    def __init__(self, module: nn.Module, run: SavedRun, optimizer_states: list[Any] | None = None) -> None:
        self._module = weakref.ref(module)
        self.run = run
        self._optimizer_states = optimizer_states
        """The states of A and B: the optimizers have their weights back."""
        self._seen = {name: seen(weight) for name, weight in self._weights(module)}

    def _weights(self, module: nn.Module) -> list[tuple[str, Tensor]]:
        parameters: Mapping[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        return [
            (name, weight)
            for name in self.run.adapters
            if (weight := parameters.get(f"{name}.weight", parameters.get(name))) is not None
        ]

    def belongs_to(self, module: nn.Module) -> bool:
        """Return whether this is what ``module`` has been trained to."""
        return self._module() is module

    def add_to(self, checkpoint: dict[str, Any], module: nn.Module) -> None:
        """Add the adapters to ``checkpoint``, which holds the merged weights of ``module``.

        A weight that was edited since is what a run that resumes starts from: its adapter is zero in the file.
        """
        run = self.run
        weights = dict(self._weights(module))
        edited = [name for name, before in self._seen.items() if seen(weights[name]) != before]
        if edited:
            run = write.with_new_bases(run, {name: weights[name] for name in edited})
        write.make_plain(checkpoint["state_dict"], run, module)
        if self._optimizer_states is not None and "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = self._optimizer_states
        checkpoint[KEY] = run.to_mapping()
