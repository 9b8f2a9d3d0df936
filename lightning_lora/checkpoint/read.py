"""Reads: turns a checkpoint's dictionary into what the module is to load, and puts its adapters back."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lora.adapters import Adapter, AdapterState
from lightning_lora.checkpoint.format import NOTICE, SavedRun, State, cast_as
from lightning_lora.checkpoint.write import fold
from lightning_lora.errors import LoRAError, listed, warn
from lightning_lora.injection.inject import Place, distinct_places, injections, places, trained_besides
from lightning_lora.naming import state_key
from lightning_lora.weights import Storage, read_only_weights
from lightning_lora.weights.digest import fingerprint
from lightning_lora.weights.quantized import is_quantized
from lightning_lora.weights.sharded import FullState, reshard


def prepare_for_loading(
    checkpoint: State, module: nn.Module, exact: bool, after_fit: SavedRun | None = None
) -> SavedRun | None:
    """Turn ``checkpoint["state_dict"]``, as read from a file, into the plain state dict that ``module`` is to load.

    An adapted module that keeps W0 gets W0, and :func:`restore_adapters` is to be called after it has loaded that; one
    that holds W, or a plain one, gets merged weights. A checkpoint without adapters stays as it is.

    Args:
        checkpoint: Lightning's dictionary; its ``state_dict`` is replaced.
        module: The LightningModule, adapted or plain, with the weights that its own code gave it.
        exact: Refuse a merged checkpoint whose W0 ``module`` does not have, instead of recovering W0.
        after_fit: The run whose increments are folded into the weights of a plain ``module``.

    Returns:
        The run of the file, if it is one's.

    Raises:
        LoRAError: If the adapters in the file are malformed, not those of this run, or stand on other weights.
    """
    if (run := SavedRun.of(checkpoint)) is None:
        return None
    found = list(places(module))
    stored = read_only_weights(module)
    run = run if found else run.of_weights
    current = tensors_of(module) if found or run.form == "adapter" else {}
    run.check_weights(checkpoint.get("state_dict"), current, stored)
    state = dict(checkpoint["state_dict"])
    state.pop(NOTICE, None)
    if found:
        _check_same_adapters(run, module, found)
    else:
        _keep_quantized(state, run, stored)
    if found or run.form == "adapter":
        _put_base_back(state, run, current, found, exact, after_fit, stored)
    if not found and run.form == "adapter":
        fold(state, run)
    for place in found:
        if place.adapter.holds and place.key not in state and place.name in run.adapters:
            _hold_again(state, place, run.adapters[place.name])
    checkpoint["state_dict"] = state
    return run


def _hold_again(state: State, place: Place, adapter: AdapterState) -> None:
    """Put W into ``state``, which leaves it out, for a module whose weight is to hold the increment of ``adapter``."""
    if place.adapter.resample is not None:
        raise LoRAError(
            f"The checkpoint leaves out the weight of {place.name!r}, which holds what was learned before the last"
            " draw. Let the module's `state_dict()` and hooks keep it in the file."
        )
    state[place.key] = Adapter.from_state(adapter).folded_into(place.weight.detach())


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of ``module`` by their keys, not by a ``state_dict()`` of the user's own.

    Lazy ones have no values yet and are left out.
    """
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {state_key(name): tensor.detach() for name, tensor in named if not is_lazy(tensor)}


@torch.no_grad()
def restore_adapters(module: nn.Module, saved: Mapping[str, AdapterState]) -> None:
    """Give the adapters of ``module`` the tensors and counts of ``saved``, by their names.

    Where they are sharded, all ranks call this together.
    """
    for place in distinct_places(module):
        if (state := saved.get(place.name)) is not None:
            place.adapter.load_tensors(place.adapter.resume(state))


def restore_shards(checkpoint: State, module: nn.Module, exact: bool, before: Mapping[str, Tensor]) -> None:
    """Put W0 and the adapters back where the weights of the file have been loaded into the shards of ``module``.

    All ranks call this together. One weight after another is gathered.

    Args:
        checkpoint: The rest of Lightning's dictionary, without ``state_dict``.
        module: The LightningModule, adapted or plain.
        exact: As for :func:`prepare_for_loading`.
        before: Key in the state dict of ``module`` -> this rank's shard of that weight before it was loaded.
    """
    if (run := SavedRun.of(checkpoint)) is None:
        return
    reshard(module)
    if found := list(places(module)):
        state = FullState(module.state_dict(), in_place=True)
        _check_same_adapters(run, module, found)
        _put_base_back(state, run, FullState(before), found, exact, None, {})
        restore_adapters(module, run.adapters)


def base_of(weight: Any, expected: str, layer: Storage | None = None) -> Tensor | None:
    """Return W0 where ``weight``, cast as a precision may cast it, has its fingerprint ``expected``; else None.

    ``layer`` is the storage of a quantised weight.
    """
    if layer is not None:
        return layer.weight.detach() if layer.has(expected) else None
    cast = cast_as(weight, expected)
    return cast if cast is not None and fingerprint(cast) == expected else None


def _put_base_back(
    state: MutableMapping[str, Any],
    run: SavedRun,
    current: Mapping[str, Tensor],
    found: list[Place],
    exact: bool,
    after_fit: SavedRun | None,
    stored: Mapping[str, Storage],
) -> None:
    """Put W0 into ``state`` where a module keeps W0: ``current`` if it has the file's fingerprint, else recovered."""
    wanted = {place.key for place in found if not place.adapter.holds} | stored.keys()
    if run.form == "adapter":
        wanted |= run.base.keys()
    folded = after_fit.by_key(current) if after_fit is not None and not found else {}
    others: list[str] = []
    for key in sorted(wanted):
        expected = run.base.get(key, "")
        base = base_of(current.get(key), expected, stored.get(key))
        if base is None and after_fit is not None and key in folded and after_fit.base.get(key) == expected:
            base, _ = Adapter.from_state(folded[key]).folded_out_of(current[key])
        if base is None:
            others.append(key)
        else:
            state[key] = base
    if others:
        _recover_base(state, run, others, run.by_key(current), exact, stored)


def _recover_base(
    state: MutableMapping[str, Any],
    run: SavedRun,
    others: list[str],
    adapters: Mapping[str, AdapterState],
    exact: bool,
    stored: Mapping[str, Storage],
) -> None:
    """Take the increments out of the merged weights ``others`` in ``state``, with a warning that bounds the error.

    Raises:
        LoRAError: If they are not in ``state`` merged, or ``exact``.
    """
    if run.form == "adapter":
        raise LoRAError(
            f"The checkpoint holds adapters only, and {listed(others)} of this module are not the weights they were"
            " trained on. Load the same pretrained weights first."
        )
    if quantized := [key for key in others if key in stored]:
        difference = _differ(run.base.get(quantized[0]), stored[quantized[0]].fingerprint())
        raise LoRAError(
            f"{listed(quantized)} of this module are quantised, and not what the checkpoint was trained on:"
            f" {difference}. What is quantised cannot be recovered from merged weights. Build the module on the same"
            " pretrained weights, quantised in the same way and on the same kind of device."
        )
    if any(key in run.base for key in others):
        reason = f"The checkpoint was trained on other weights than this module has in {listed(others)}"
        remedy, with_error = "build the module on the same pretrained weights", "with an error"
        bases = [run.base.get(key, "") for key in others]
        if kinds := sorted({base.split(":")[2] for base in bases if is_quantized(base)}):
            remedy += f", quantised as they were ({', '.join(kinds)}; `pip install 'lightning-lora[quantization]'`)"
    else:
        reason = f"The checkpoint's run held the increments in the weights, and this one needs W0 in {listed(others)}"
        # what each step was rounded by stays in W0
        remedy, with_error = "use the `gradient` of the run that was saved", "and gives them back with an error"
    if exact:
        raise LoRAError(
            f"{reason}, and `exact_resume=True` was asked for. To resume exactly, {remedy}, or allow W0 to be recovered"
            " from the merged weights by `exact_resume=False`."
        )
    if absent := [key for key in others if key not in state]:
        raise LoRAError(
            f"The checkpoint was trained on other weights than this module has in {listed(absent)}, and does not hold"
            " them: the module's `state_dict()`, or a hook, left them out. Build the module on the same pretrained"
            " weights."
        )
    bound = 0.0
    for key in others:
        if key in adapters:  # else its adapter was trained by no optimizer, and is zero
            state[key], error = Adapter.from_state(adapters[key]).folded_out_of(state[key])
            bound = max(bound, 1.05 * error)  # what is printed, two digits, is still a bound
    if not bound:
        warn(f"{reason}. W0 was taken from the file, to the bit. `exact_resume=True` makes this an error.")
        return
    warn(
        f"{reason}. W0 was recovered from the merged weights, {with_error} of at most {bound:.1e} in any entry, so"
        f" the run that resumes is close to the one that was saved but not bitwise equal. To resume exactly, {remedy};"
        " `exact_resume=True` makes this an error."
    )


def _differ(expected: str | None, here: str) -> str:
    """Say in what two fingerprints differ, as far as it can be told."""
    if expected is None:
        return "it was trained with the increment in the weight"
    then, now = ("plain" if not is_quantized(value) else value.split(":")[2] for value in (expected, here))
    return f"that was {then}, this is {now}" if then != now else f"both are {now}, of other values"


def _keep_quantized(state: State, run: SavedRun, stored: Mapping[str, Storage]) -> None:
    """Leaves quantised layers of a module without adapters as they are; merged weights do not go into them."""
    adapted = run.by_key(stored)
    if others := [key for key in stored if key in adapted or not stored[key].has(run.base.get(key, ""))]:
        raise LoRAError(
            f"{listed(others)} of this module are quantised, and cannot hold the increments in the checkpoint. To"
            " evaluate it, load a file of `checkpoint='merged'` into the plain module, and quantise that if you like;"
            " or give it to the Trainer that ran `fit`, whose module is plain now."
        )
    state.update({key: layer.weight.detach() for key, layer in stored.items()})


def _check_same_adapters(run: SavedRun, module: nn.Module, found: list[Place]) -> None:
    """Raise ``LoRAError`` unless the file's adapters are like those of ``module``, and what it trains besides."""
    here = {place.name: place.adapter for place in found}
    if missing := [name for name in run.adapters if name not in here]:
        raise LoRAError(
            f"The checkpoint has adapters for {listed(missing)}, which this run does not adapt. Give the callback the"
            " options of the run that was saved."
        )
    if new := [name for name in here if name not in run.adapters and name not in run.idle]:
        old = " In version 0.1.0 the default was `target_modules='all-linear'`." if run.version == 1 else ""
        raise LoRAError(
            f"This run adapts {listed(new)}, for which the checkpoint has no adapters. Give the callback the options"
            f" of the run that was saved.{old}"
        )
    for name, state in run.adapters.items():
        given = here[name]
        tensors = given.saved()
        saved = {what: state.tensors[what] for what in tensors if what in state.tensors}
        for what, now, then in (
            ("decomposition", given.decomposition, state.decomposition),
            ("resample", given.resample, state.resample),
            ("the seed and name", given.resample and given.key, given.resample and state.key),
            ("rank", given.rank, state.rank),
            ("tensors", sorted(tensors), sorted(saved)),
            ("shapes", _shapes(tensors), _shapes(saved)),
            ("start", "zero" if given.A0 is None else "A0 B0", "A0 B0" if "A0" in state.tensors else "zero"),
            ("a weight of shape", list(given.shape), state.shape),
            ("transposed", given.transposed, state.transposed),
            ("scale", given.scale, state.scale),
            ("dtype", given.A.dtype, state.B.dtype),
        ):
            if now != then:
                raise LoRAError(
                    f"The adapter of {name!r} has {what} {then} in the checkpoint and {now} in this run. Give the"
                    " callback the options of the run that was saved."
                )
    names = trained_besides(module)
    injected = next((injection.options for injection in injections(module)), None)
    same = bool(run.options) and all(
        _listed_option(run.options.get(option)) == _listed_option(getattr(injected, option))
        for option in ("bias", "modules_to_save")
    )
    # what the module's own hooks train besides is no reason: a merged file has all weights
    if set(names) != set(run.trained) and not (same and run.form == "merged"):
        raise LoRAError(
            f"Besides the adapters, the checkpoint trained {listed(run.trained)} and this run trains"
            f" {listed(names)}. Give the callback the `bias` and `modules_to_save` of the run that was saved."
        )


def _listed_option(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensors[name].shape) for name in sorted(tensors)}
