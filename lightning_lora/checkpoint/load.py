"""Loads adapters from files into a module for inference: several under names, one in use at a time, and their sums.

Outside of a Trainer, a module with loaded adapters keeps W0 in its parameters; choosing an adapter exchanges classes
and copies only what was trained in full, such as a head. So any number of adapters share one copy of the model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_lora.adapters import Adapter
from lightning_lora.checkpoint.files import File, read
from lightning_lora.checkpoint.format import SavedRun, weight_key
from lightning_lora.checkpoint.read import base_of, tensors_of
from lightning_lora.errors import LoRAError, listed, warn
from lightning_lora.hosts import Host, release
from lightning_lora.injection.inject import LOADED, Injection, adapters, carry, kept, set_flags, unnested
from lightning_lora.injection.options import Options
from lightning_lora.naming import plain_name, unwrapped
from lightning_lora.weights import read_only_weights
from lightning_lora.weights.sharded import is_sharded

CLOSE = 0.01
"""How far, as a share of what was learned, W0 + increment may be from the merged weight in a file."""


@dataclasses.dataclass
class NamedAdapter:
    """What one file makes of a module."""

    adapters: dict[str, Adapter]
    """Name of an adapted parameter -> its adapter."""
    others: dict[str, Tensor]
    """Name of a parameter or buffer -> what stands in its place: what was trained in full, running statistics."""


@dataclasses.dataclass
class Loaded:
    """The named adapters of a module, kept on it as ``lora_loaded``."""

    named: dict[str, NamedAdapter] = dataclasses.field(default_factory=dict)
    active: str | None = None
    before: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """The module's own tensors, while others of the active adapter stand in their places."""
    injection: Injection = dataclasses.field(default_factory=lambda: Injection(Options()))
    """What is changed in the module besides its classes."""


def load_adapter(module: nn.Module, file: File, name: str = "default") -> list[str]:
    """Put the adapters of a checkpoint into ``module`` for inference, under ``name``, and use them.

    The module has to hold the pretrained weights W0, which fingerprints in the file tell. Of a file of
    ``checkpoint="merged"`` it may hold the merged weights instead, as after ``load_from_checkpoint``: then they become
    W0 = W - increment, up to rounding, with a warning that bounds the error. Weights that are neither are an error, as
    other adapters of the module stand on them. What the file has besides, such as a new head, a bias or running
    statistics, stands in the module while this adapter is in use.

    Args:
        module: One of the class that was trained. It keeps its parameters; they are W0.
        file: A checkpoint of a run with ``LoRA``; its path, or what ``torch.load`` has made of it. A path is read with
            ``weights_only=True``.
        name: For :func:`set_adapter` and :func:`combine_adapters`.

    Returns:
        The names of what is adapted, as by :func:`~lightning_lora.adapters`.

    Raises:
        LoRAError: If the file has no adapters, or they are damaged or malformed; if they are not for the weights that
            ``module`` holds, if ``name`` is taken, or ``module`` is being trained or sharded. In each case it is as it
            was.

    Example::

        >>> model = Model.load_from_checkpoint("pretrained.ckpt")  # doctest: +SKIP
        >>> load_adapter(model, "french.ckpt", "french")  # doctest: +SKIP
        >>> load_adapter(model, "german.ckpt", "german")  # doctest: +SKIP
        >>> set_adapter(model, "french")  # doctest: +SKIP
    """
    module = unwrapped(module)
    loaded = _loaded(module)
    if not isinstance(name, str) or not name:
        raise LoRAError(f"The name of an adapter is a text, got {name!r}. None is the base function.")
    if name in loaded.named:
        raise LoRAError(f"The module has an adapter called {name!r}. Give this one another `name`.")
    if is_sharded(module):
        raise LoRAError("The module is sharded. Load adapters before `fully_shard`, or `merge` them into the weights.")
    found = read(file)
    run, active = found.run(), loaded.active
    set_adapter(module, None)
    try:
        new, merged = _resolve(module, run, found.plain_weights())
    except BaseException:
        set_adapter(module, active)
        raise
    _recover(module, new, merged)
    vars(module)[LOADED] = loaded
    loaded.named[name] = new
    set_adapter(module, name)
    return list(adapters(module))


@torch.no_grad()
def set_adapter(module: nn.Module, name: str | None) -> None:
    """Have ``module`` compute with the adapter called ``name``; with None, the base function, as a plain module.

    No weight is copied, but for what the adapter has trained in full.

    Args:
        module: One that has adapters by :func:`load_adapter`.
        name: Of one of them, or None.

    Raises:
        LoRAError: If there is no such adapter, or ``module`` has others, which are being trained.
    """
    module = unwrapped(module)
    loaded = _loaded(module)
    if name is not None:
        _check_names(loaded, [name])
    tensors = _tensors(module)
    for key, value in loaded.before.items():
        tensors[key].copy_(value)
    for child in list(module.modules()):
        if isinstance(child, Host):
            release(child)
    set_flags(module, loaded.injection, adapted=False)
    loaded.active, loaded.before, loaded.injection = name, {}, Injection(Options())
    if name is None:
        return
    chosen = loaded.named[name]
    weights = _parameters(module)
    by_weight = {weights[key]: adapter.to(weights[key].device) for key, adapter in chosen.adapters.items()}
    for child in list(module.modules()):
        own = {name: by_weight[p] for name, p in child._parameters.items() if p is not None and p in by_weight}
        if own:
            carry(child, own, "factored")
    loaded.before = {key: tensors[key].clone() for key in chosen.others}
    for key, value in chosen.others.items():
        tensors[key].copy_(value)
    loaded.injection = Injection(Options(), unnested=unnested(module), kept=kept(module))
    set_flags(module, loaded.injection, adapted=True)


@torch.no_grad()
def combine_adapters(module: nn.Module, weights: Mapping[str, float], into: str) -> list[str]:
    """Make the weighted sum of adapters, and use it: W0 + sum_i w_i (W_i - W0).

    The sum is exact: the ranks are stacked, A = [A_1; A_2; ...] and B = [w_1 s_1 B_1; w_2 s_2 B_2; ...], at least in
    float32. Parameters that were trained in full are summed by their differences from those of the base.

    Args:
        module: One that has adapters by :func:`load_adapter`.
        weights: Name of an adapter -> its weight, which may be negative.
        into: The name of the sum.

    Returns:
        The names of what is adapted.

    Raises:
        LoRAError: If an adapter is no increment alone, as DoRA's, or has buffers of its own, such as running
            statistics; if a weight is no finite number; if a name is unknown, or ``into`` is taken.
    """
    module = unwrapped(module)
    loaded = _loaded(module)
    if not isinstance(weights, Mapping):
        raise LoRAError(f"`weights` is a dictionary, name of an adapter -> its weight, got {weights!r}.")
    _check_names(loaded, weights)
    if not weights or not all(isinstance(w, int | float) and math.isfinite(w) for w in weights.values()):
        raise LoRAError(f"`weights` gives each adapter a finite number, got {dict(weights)!r}.")
    if not isinstance(into, str) or not into or into in loaded.named:
        raise LoRAError(f"`into` is a name that no adapter of the module has, got {into!r}.")
    parts = [(weight, loaded.named[name]) for name, weight in weights.items()]
    for name, (_, part) in zip(weights, parts, strict=True):
        if bad := [key for key, adapter in part.adapters.items() if adapter.rescales]:
            raise LoRAError(
                f"{name!r} rescales {listed(bad)} ({part.adapters[bad[0]].decomposition}), so its sum with others is no"
                " low-rank increment. Only products can be combined."
            )
        if bad := sorted(part.others.keys() - _parameters(module).keys()):
            raise LoRAError(f"{name!r} has other buffers than the module, {listed(bad)}, of which there is no sum.")
    keys = list(dict.fromkeys(key for _, part in parts for key in part.adapters))
    summed = {key: _sum([(w, part.adapters[key]) for w, part in parts if key in part.adapters]) for key in keys}
    active = loaded.active
    set_adapter(module, None)
    base = _tensors(module)
    others: dict[str, Tensor] = {}
    for weight, part in parts:
        for key, value in part.others.items():
            dtype = torch.promote_types(value.dtype, torch.float32)
            own = base[key].to(dtype)
            others[key] = others.get(key, own) + weight * (value.to(own) - own)
    set_adapter(module, active)
    loaded.named[into] = NamedAdapter(summed, others)
    set_adapter(module, into)
    return list(adapters(module))


# ---------------------------------------------------------------------------------------------------------------- files


def _resolve(module: nn.Module, run: SavedRun, state: Mapping[str, Tensor]) -> tuple[NamedAdapter, list[str]]:
    """Return what the file makes of ``module``, and which of the file's merged weights ``module`` holds.

    Nothing is changed.
    """
    current, parameters = _tensors(module), _parameters(module)
    stored = {plain_name(key): storage for key, storage in read_only_weights(module).items()}
    base = {plain_name(key): expected for key, expected in run.base.items()}
    run.check_weights(state, current, stored)
    first = {parameter: key for key, parameter in reversed(parameters.items())}
    found: dict[str, Adapter] = {}
    merged: list[str] = []
    strange: list[str] = []
    for name, saved in run.adapters.items():
        key = weight_key(name, parameters)
        if key not in parameters:
            raise LoRAError(f"The file has an adapter for {name!r}, and {type(module).__name__} has no such weight.")
        if saved.resample is not None:
            raise LoRAError(
                f"The projections of {name!r} were drawn anew while training, and what was learned before the last"
                " draw is in the merged weights alone. Load the file as a plain checkpoint."
            )
        weight, W = parameters[key], state.get(key)
        if first[weight] in found:
            raise LoRAError(f"The file has two adapters for {name!r}, whose weight stands in two places.")
        found[first[weight]] = adapter = Adapter.from_state(saved.detached()).requires_grad_(False)
        if base_of(weight.detach(), base.get(key, ""), stored.get(key)) is not None:
            continue
        if key not in stored and W is not None and _is_same(W, weight):
            merged.append(first[weight])
        elif key in stored or W is None or not _is_base(adapter, weight, W):
            strange.append(key)
    adapted = {parameters[key] for key in found}
    others = [key for key in base if parameters.get(key) not in adapted]
    strange += [key for key in others if base_of(current.get(key), base[key], stored.get(key)) is None]
    if strange:
        how = "the weights that it was trained on"
        if run.form == "merged":
            how += ", or the file's own, by `load_state_dict` of its `state_dict`"
        raise LoRAError(f"{listed(strange)} of this module are not what the adapter stands on. Load {how}, first.")
    besides = {k: v for k, v in state.items() if k not in stored and parameters.get(k) not in adapted}
    for key, value in besides.items():
        if key not in current or current[key].shape != value.shape:
            here = "has none" if key not in current else f"has the shape {tuple(current[key].shape)} there"
            raise LoRAError(f"The file has {key!r} of the shape {tuple(value.shape)}, and the module {here}.")
    return NamedAdapter(found, {k: v.clone() for k, v in besides.items() if not _is_same(v, current[k])}), merged


def _is_same(value: Tensor, weight: Tensor) -> bool:
    """Return whether ``weight`` is ``value``, bit for bit in the dtype of ``value``."""
    return value.shape == weight.shape and torch.equal(weight.detach().to(value), value)


@torch.no_grad()
def _is_base(adapter: Adapter, weight: Tensor, W: Tensor) -> bool:
    """Return whether ``weight`` is W0 up to rounding: with the increment it is W, to a small share of what it lacks."""
    W, own = W.to(weight.device, torch.float64), weight.double()
    there = adapter.to(weight.device).folded_into(own)
    return bool((there - W).norm() <= CLOSE * (own - W).norm())


@torch.no_grad()
def _recover(module: nn.Module, new: NamedAdapter, merged: list[str]) -> None:
    """Take the increments out of the merged weights that ``module`` holds."""
    parameters, bound = _parameters(module), 0.0
    for key in merged:
        base, error = new.adapters[key].to(parameters[key].device).folded_out_of(parameters[key])
        parameters[key].copy_(base)
        bound = max(bound, 1.05 * error)
    if bound:
        warn(
            f"The module held the merged weights of the file, so W0 was recovered from them, with an error of at most"
            f" {bound:.1e} in any entry. Load adapters into the pretrained weights to have them exactly."
        )


# -------------------------------------------------------------------------------------------------------------- modules


def _loaded(module: nn.Module) -> Loaded:
    """Return the named adapters of ``module``, none if there are none.

    Raises:
        LoRAError: If it has other adapters.
    """
    loaded: Loaded = vars(module).get(LOADED) or Loaded()
    mine = {id(a) for a in loaded.named[loaded.active].adapters.values()} if loaded.active is not None else set()
    if {id(adapter) for adapter in adapters(module).values()} - mine:
        raise LoRAError(
            f"{type(module).__name__} has adapters of its own, as those of `inject` or of a run. `merge` them first, or"
            " load into another module with the same weights."
        )
    return loaded


def _check_names(loaded: Loaded, names: Iterable[str]) -> None:
    if unknown := [name for name in names if name not in loaded.named]:
        raise LoRAError(f"The module has no adapter called {unknown[0]!r}; it has {listed(loaded.named)}.")


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {plain_name(name): p for name, p in module.named_parameters(remove_duplicate=False)}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {plain_name(key): tensor for key, tensor in tensors_of(module).items()}


def _sum(parts: list[tuple[float, Adapter]]) -> Adapter:
    """Return the product that is the weighted sum of ``parts``, of one weight."""
    increments = [(weight * adapter.scale, *adapter.increment()) for weight, adapter in parts]
    dtype = functools.reduce(torch.promote_types, (A.dtype for _, A, _ in increments), torch.float32)
    like = parts[0][1]
    A = torch.cat([A.to(like.A.device, dtype) for _, A, _ in increments], -2)
    B = torch.cat([factor * B.to(like.A.device, dtype) for factor, _, B in increments], -2)
    return Adapter(A, B, like.shape, transposed=like.transposed).requires_grad_(False)
