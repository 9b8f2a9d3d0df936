"""Writes: what a checkpoint's dictionary says of the adapters, and the plain model's state dict beside it.

Adapters, weights and their fingerprints come from the module. The dictionary is the user's: a ``state_dict`` or
``on_save_checkpoint`` of the module's own, or another callback, may have left entries out, or put another model there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lora.adapters import Adapter, AdapterState, full_adapters
from lightning_lora.checkpoint.fingerprints import Fingerprints
from lightning_lora.checkpoint.format import NOTICE, SavedRun, State, weight_key
from lightning_lora.hosts import layer_of
from lightning_lora.injection.inject import places, trained_besides
from lightning_lora.injection.options import Options
from lightning_lora.weights import read_only_weights, storages
from lightning_lora.weights.digest import fingerprint
from lightning_lora.weights.quantized import without_extras
from lightning_lora.weights.sharded import FullState


def describe(
    module: nn.Module, options: Options, form: str, fingerprints: Fingerprints, idle: frozenset[str] = frozenset()
) -> SavedRun:
    """Return what ``checkpoint["lightning_lora"]`` says of ``module``, which has adapters.

    Where the module is sharded, all ranks call this together: A, B and, one after another, frozen weights are gathered.

    Args:
        module: The adapted module.
        options: Those of its injection, to be read by people.
        form: ``"merged"`` or ``"adapter"``.
        fingerprints: Those of the run, so that each weight is read once.
        idle: Names of adapters that no optimizer trains, and that are left out.
    """
    found = [place for place in places(module) if place.name not in idle]
    adapters: dict[str, AdapterState] = {}
    for place, adapter in zip(found, full_adapters([place.adapter for place in found]), strict=True):
        # to gather the weight costs, and only a decomposition with a gain reads it
        weight = place.stored.full() if adapter.rescales else place.weight
        adapters[place.name] = adapter.state(weight).detached()
    frozen = {place.key: place.stored for place in places(module) if not place.adapter.holds}
    trained = trained_besides(module)
    if form == "adapter":
        factors = {p for place in places(module) for p in place.adapter.parameters()}
        others = {key: stored for key, stored in storages(module).items() if key not in trained}
        frozen |= {
            k: stored for k, stored in others.items() if stored.weight not in factors and not is_lazy(stored.weight)
        }
    frozen |= read_only_weights(module)
    return SavedRun(
        form=form,
        options=options.to_primitives(),
        adapters=adapters,
        trained=trained,
        idle=sorted(idle),
        base={key: fingerprints.of(key, stored) for key, stored in frozen.items()},
        layers={place.name: layer_of(place.host, place.key.rpartition(".")[2]) for place in places(module)},
    )


def make_plain(state: State, run: SavedRun, module: nn.Module) -> None:
    """Turn ``state``, that of a module whose ``state_dict()`` is merged, into what is written to the file.

    Quantised weights become plain, with their increments; in the form ``"adapter"``, what is frozen is left out.

    Args:
        state: Changed in place.
        run: What :func:`describe` returned.
        module: What ``state`` was taken of, with adapters or plain and merged.
    """
    stored = read_only_weights(module)
    without_extras(state, stored)
    if run.form == "adapter":
        for key in run.base:
            state.pop(key, None)
        state[NOTICE] = torch.empty(0)
        return
    adapters = {place.key: place.adapter for place in places(module)}
    for key in stored.keys() & state.keys():
        weight = stored[key].full()
        merged = adapters[key].folded_into(weight) if key in adapters else weight
        state[key] = merged.to(stored[key].dtype)


def missing_weights(state: Mapping[str, Any], run: SavedRun) -> list[str]:
    """Return what is not in ``state`` and should be: adapters' names, for their weights, and keys that were trained."""
    adapted = run.adapters if run.form == "merged" else ()
    absent = [name for name in adapted if weight_key(name, state) not in state]
    return absent + [key for key in run.trained if key not in state]


def merged_shards(state: State, module: nn.Module, run: SavedRun) -> State:
    """Return the merged state dict of a sharded module, of which each rank holds the shards that it writes.

    All ranks call this together. One weight after another is gathered.

    Args:
        state: That of the adapted ``module``, in shards, with its adapters. It is left as it is.
        module: The adapted module.
        run: What :func:`describe` returned.
    """
    full = FullState(state)
    for place in places(module):
        for name in place.adapter.state_dict():
            full.data.pop(f"{place.factors}{name}", None)
    fold(full, run)
    return full.data


def fold(state: MutableMapping[str, Any], run: SavedRun) -> None:
    """Fold the increments of ``run`` into the weights W0 in ``state``, once for weights that share storage."""
    folded: dict[int, Tensor] = {}
    for key, adapter in run.by_key(state).items():
        if key in run.base and key in state:  # a full one is on rank 0 alone
            weight = state[key]
            if isinstance(state, FullState):  # what it gives has no place of its own
                folded.clear()
            if weight.data_ptr() not in folded:
                folded[weight.data_ptr()] = Adapter.from_state(adapter).to(weight.device).folded_into(weight)
            state[key] = folded[weight.data_ptr()]


def with_new_bases(run: SavedRun, weights: Mapping[str, Tensor]) -> SavedRun:
    """Return ``run`` for ``weights`` (name of the adapter -> weight) that became new W0, with no increment."""
    adapters, base = dict(run.adapters), dict(run.base)
    for name, weight in weights.items():
        state = adapters[name]
        zeroed = Adapter.from_state(state).without_increment(weight)
        tensors = {what: zeroed.get(what, tensor) for what, tensor in state.tensors.items()}
        adapters[name] = dataclasses.replace(state, tensors=tensors)
        key = weight_key(name, base)
        if key in base:
            base[key] = fingerprint(weight)
    return dataclasses.replace(run, adapters=adapters, base=base)
