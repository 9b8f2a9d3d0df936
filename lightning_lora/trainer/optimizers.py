"""Puts each adapter into the place of its weight in the user's optimizers, and the weights back at the end.

This is the article's view of LoRA as a change to the optimizer (https://kexue.fm/archives/9590, "Optimization
Perspective"). The optimizers are those that the module's author meant for full fine-tuning: made before the adapters
existed, or in ``configure_optimizers`` on the module as it was before injection. Groups, their options, their order and
the schedulers that know them stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.errors import LoRAError, listed, warn

Trained = Mapping[Tensor, Mapping[str, nn.Parameter]]
"""Adapted weight -> the trained tensors of its adapter, by their names in the module."""


def find_optimizers(configured: Any) -> list[Optimizer]:
    """Return the optimizers in what ``configure_optimizers`` gave, in whichever of its forms, each once."""
    found: dict[int, Optimizer] = {}

    def collect(value: Any) -> None:
        if isinstance(value, Optimizer):
            found.setdefault(id(value), value)
        elif isinstance(value, Mapping):
            collect(value.get("optimizer"))
        elif isinstance(value, list | tuple):
            for item in value:
                collect(item)

    collect(configured)
    return list(found.values())


class Substitution:
    """The adapters that stand in one optimizer for their weights, and what it takes to put the weights back.

    A weight gives its place to the trained tensors of its adapter, in their order. Weights that injection has frozen
    and that have no adapter leave. States that the weights have already are set aside; where a constructor makes states
    (Adagrad's), those of A and B are made as the constructor would.

    Args:
        optimizer: The user's own. Its groups' lists are changed in place.
        trained: Adapted weight -> the trained tensors of its adapter.
        frozen: Weights that injection has frozen, the adapted ones among them.

    Raises:
        LoRAError: If the optimizer keeps a list of the weights besides its groups, or is left with nothing to train.
    """

    def __init__(self, optimizer: Optimizer, trained: Trained, frozen: Mapping[Tensor, str]) -> None:
        self._optimizer = optimizer
        self._groups = [(group, list(group["params"]), group.get("param_names")) for group in optimizer.param_groups]
        self._trained = trained
        self._frozen = dict(frozen)
        self._states: dict[Tensor, Any] = {}
        self._new: set[Tensor] = set()
        before = [p for _, params, _ in self._groups for p in params]
        self.owners = {p: (optimizer, group) for group, params, _ in self._groups for p in params}
        """Weight that the optimizer had before -> the optimizer and the group."""
        if not any(p in frozen for p in before):
            return
        self._fill()
        emptied = [frozen[p] for group, params, _ in self._groups if not group["params"] for p in params]
        remaining = [p for group in optimizer.param_groups for p in group["params"]]
        self._new = set(remaining) - set(before)
        if not any(p.requires_grad for p in remaining):
            self.undo()
            left = [frozen[p] for p in before if p in frozen]
            raise LoRAError(
                f"{type(optimizer).__name__} has nothing left to train: none of its weights got an adapter, and they"
                f" are frozen ({listed(left)}). Name modules of its own in `target_modules`, or in"
                " `modules_to_save` to train them in full."
            )
        self._move_states(before, trained)
        if (holder := _own_list(optimizer, frozen)) is not None:
            self.undo()
            raise LoRAError(
                f"{type(optimizer).__name__} keeps the weights in a list of its own, `{holder}`, besides its parameter"
                " groups, and adapters cannot take their places there. Wrap the optimizer after the adapters are in"
                " it, in `on_train_start`, or use the optimizer inside it."
            )
        if emptied:
            warn(
                f"A parameter group of {type(optimizer).__name__} is empty now: {listed(emptied)} are frozen and got"
                " no adapter. `target_modules` or `modules_to_save` would let them be trained."
            )

    def _fill(self) -> None:
        """Put adapters in the places of their weights and leave frozen ones out; what was added since stays last."""
        for group, params, names in self._groups:
            kept = list(_replaced(params, names, self._trained, self._frozen))
            ours = set(params) | {p for p, _ in kept}
            added = [(p, index) for index, p in enumerate(group["params"]) if p not in ours]
            if names is not None:
                group["param_names"] = [n for _, n in kept] + [group["param_names"][index] for _, index in added]
            group["params"][:] = [p for p, _ in kept] + [p for p, _ in added]

    def _move_states(self, before: Iterable[Tensor], trained: Trained) -> None:
        state = self._optimizer.state
        made: list[Tensor] = []
        remaining = {p for group in self._optimizer.param_groups for p in group["params"]}
        for weight in before:
            if weight in state and weight not in remaining:
                self._states[weight] = state.pop(weight)
                made += trained.get(weight, {}).values()
        if made and (group := dict(self._optimizer.defaults)):
            accepted = inspect.signature(type(self._optimizer).__init__).parameters
            options = {name: value for name, value in group.items() if name in accepted}
            state.update(type(self._optimizer)(made, **options).state)

    def put_back(self, weights: Iterable[Tensor]) -> None:
        """Put ``weights``, which are trained again, back into the places that they had left."""
        for p in weights:
            self._frozen.pop(p, None)
        self._fill()

    def undo(self) -> None:
        """Put the weights back, with the states that they had; groups that were added since stay."""
        for group, params, names in self._groups:
            ours = set(params) | self._new
            added = [(p, index) for index, p in enumerate(group["params"]) if p not in ours]
            if names is not None:
                group["param_names"] = [*names, *(group["param_names"][index] for _, index in added)]
            group["params"][:] = [*params, *(p for p, _ in added)]
        for p in self._new:
            self._optimizer.state.pop(p, None)
        self._optimizer.state.update(self._states)


def _replaced(
    params: list[Tensor], names: list[str] | None, trained: Trained, frozen: Mapping[Tensor, str]
) -> Iterator[tuple[Tensor, str]]:
    for index, p in enumerate(params):
        if p in trained:
            yield from ((factor, name) for name, factor in trained[p].items())
        elif p not in frozen:
            yield p, "" if names is None else names[index]


def _own_list(optimizer: Optimizer, frozen: Mapping[Tensor, str]) -> str | None:
    """Return the name of an attribute of ``optimizer`` that holds frozen weights, or None."""
    for name, value in vars(optimizer).items():
        if name in ("param_groups", "state", "defaults"):
            continue
        items = value.values() if isinstance(value, Mapping) else value
        if isinstance(items, Optimizer):
            inner = items.param_groups
            if inner is not optimizer.param_groups and any(p in frozen for group in inner for p in group["params"]):
                return name
        elif isinstance(items, list | tuple | set) or isinstance(value, Mapping):
            flat = (leaf for item in items for leaf in (item if isinstance(item, list | tuple) else [item]))
            groups = (p for leaf in flat for p in (leaf.get("params", ()) if isinstance(leaf, dict) else [leaf]))
            if any(isinstance(p, Tensor) and p in frozen for p in groups):
                return name
    return None


def old_order(optimizers: list[Optimizer], states: list[Any], module: nn.Module) -> None:
    """Put optimizer states of files of version 0.1.0 in today's order, in place.

    There adapters stood in the optimizers by themselves, behind the other parameters of their layer, and frozen weights
    stayed in groups that were made of all parameters.

    Args:
        optimizers: Those of this run, with the adapters in the places of their weights.
        states: Their states in the file.
        module: The adapted module, with its adapters among its parameters.
    """
    place = {p: index for index, p in enumerate(module.parameters())}
    for optimizer, state in zip(optimizers, states, strict=False):
        first = 0
        moved: dict[int, int] = {}
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=False):
            now = [p for p in group["params"] if p.requires_grad]
            count, old = len(saved["params"]), sorted(now, key=lambda p: place.get(p, 0))
            if count != len(old):  # all parameters of some modules, frozen ones too
                spans = sorted(place[p] for p in now if p in place)
                everything = list(module.parameters())
                old = next(
                    (
                        window
                        for start in range(spans[0] + 1)
                        if len(window := everything[start : start + count]) == count and set(now) <= set(window)
                    ),
                    old,
                )
            index = {p: saved["params"][i] for i, p in enumerate(old) if i < count}
            group_now = [index[p] for p in group["params"] if p in index]
            moved |= {before: first + i for i, before in enumerate(group_now)}
            saved["params"] = list(range(first, first + len(group_now)))
            first += len(group_now)
        state["state"] = {moved[i]: value for i, value in state["state"].items() if i in moved}


def refuse_hooked(weights: Mapping[Tensor, str]) -> None:
    """Refuse adapted weights whose gradient a hook waits for: as frozen weights they have none.

    Raises:
        LoRAError: If an optimizer that steps in the backward, or other code, has put a hook on one of ``weights``.
    """
    for weight, name in weights.items():
        if getattr(weight, "_post_accumulate_grad_hooks", None) or weight._backward_hooks:
            raise LoRAError(
                f"{name!r} has a hook that waits for its gradient (`register_hook` or"
                " `register_post_accumulate_grad_hook`, as optimizers that step in the backward use it), and a weight"
                " with an adapter has none. Put the hook on the adapter's A and B, which"
                " `lightning_lora.adapters(module)` gives in `on_fit_start`, or exclude the module."
            )
