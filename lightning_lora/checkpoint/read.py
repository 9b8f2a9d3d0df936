"""Reads: turns a checkpoint's dictionary into what the module is to load, and puts its adapters back."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lora.adapters import Adapter
from lightning_lora.checkpoint.format import (
    KEY,
    NOTICE,
    NUMBERS,
    State,
    check_format,
    check_weights,
    dtype_of,
    weight_key,
)
from lightning_lora.checkpoint.write import fold
from lightning_lora.errors import LoRAError, listed, warn
from lightning_lora.injection.inject import Place, injections, places, trained_besides
from lightning_lora.naming import state_key
from lightning_lora.weights import Storage, read_only_weights
from lightning_lora.weights.digest import fingerprint
from lightning_lora.weights.quantized import is_quantized
from lightning_lora.weights.sharded import FullState, reshard

NO_FILE: State = {"base": {}, "adapters": {}}


def prepare_for_loading(checkpoint: State, module: nn.Module, exact: bool, merged: State | None = None) -> None:
    """Turn ``checkpoint["state_dict"]``, as read from a file, into the plain state dict that ``module`` is to load.

    An adapted module that keeps W0 gets W0, and :func:`restore_adapters` is to be called after it has loaded that; one
    that holds W, or a plain one, gets merged weights. A checkpoint without adapters stays as it is.

    Args:
        checkpoint: Lightning's dictionary; its ``state_dict`` is replaced.
        module: The LightningModule, adapted or plain, with the weights that its own code gave it.
        exact: Refuse a merged checkpoint whose W0 ``module`` does not have, instead of recovering W0.
        merged: The ``checkpoint["lightning_lora"]`` whose increments are folded into the weights of a plain ``module``.

    Raises:
        ValueError: If the adapters in the file are malformed.
        LoRAError: If they are not those of this run, or stand on other weights.
    """
    if (payload := checkpoint.get(KEY)) is None:
        return
    check_format(payload)
    found = list(places(module))
    stored = read_only_weights(module)
    current = tensors_of(module) if found or payload["form"] == "adapter" else {}
    check_weights(payload, checkpoint.get("state_dict"), current, stored)
    state = dict(checkpoint["state_dict"])
    state.pop(NOTICE, None)
    if not found:
        _keep_quantized(state, payload, stored)
    if found:
        _check_same_adapters(payload, module, found)
    if found or payload["form"] == "adapter":
        _put_base_back(state, payload, current, found, exact, merged or NO_FILE, stored)
    if not found and payload["form"] != "merged":
        fold(state, payload)
    for place in found:
        if place.adapter.holds and place.key not in state and place.name in payload["adapters"]:
            _hold_again(state, place, payload["adapters"][place.name])
    checkpoint["state_dict"] = state


def _hold_again(state: State, place: Place, entry: State) -> None:
    """Put W into ``state``, which leaves it out, for a module whose weight is to hold the increment in ``entry``."""
    if place.adapter.resample is not None:
        raise LoRAError(
            f"The checkpoint leaves out the weight of {place.name!r}, which holds what was learned before the last"
            " draw. Let the module's `state_dict()` and hooks keep it in the file."
        )
    state[place.key] = Adapter.from_state(entry).folded_into(place.weight.detach())


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of ``module`` by their keys, not by a ``state_dict()`` of the user's own.

    Lazy ones have no values yet and are left out.
    """
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {state_key(name): tensor.detach() for name, tensor in named if not is_lazy(tensor)}


@torch.no_grad()
def restore_adapters(module: nn.Module, payload: State) -> None:
    """Give the adapters of ``module`` the tensors and counts that ``payload`` holds."""
    for place in {id(place.adapter): place for place in places(module)}.values():
        if (entry := payload["adapters"].get(place.name)) is not None:
            place.adapter.load_tensors(place.adapter.resume(entry))


def restore_shards(checkpoint: State, module: nn.Module, exact: bool, before: Mapping[str, Tensor]) -> None:
    """Put W0 and the adapters back where the weights of the file have been loaded into the shards of ``module``.

    All ranks call this together. One weight after another is gathered.

    Args:
        checkpoint: The rest of Lightning's dictionary, without ``state_dict``.
        module: The LightningModule, adapted or plain.
        exact: As for :func:`prepare_for_loading`.
        before: Key in the state dict of ``module`` -> this rank's shard of that weight before it was loaded.
    """
    if (payload := checkpoint.get(KEY)) is None:
        return
    check_format(payload)
    reshard(module)
    if found := list(places(module)):
        state = FullState(module.state_dict(), in_place=True)
        _check_same_adapters(payload, module, found)
        _put_base_back(state, payload, FullState(before), found, exact, NO_FILE, {})
        restore_adapters(module, payload)


def _put_base_back(
    state: MutableMapping[str, Any],
    payload: State,
    current: Mapping[str, Tensor],
    found: list[Place],
    exact: bool,
    merged: State,
    stored: Mapping[str, Storage],
) -> None:
    """Put W0 into ``state`` where a module keeps W0: ``current`` if it has the file's fingerprint, else recovered."""
    wanted = {place.key for place in found if not place.adapter.holds} | stored.keys()
    if payload["form"] == "adapter":
        wanted |= set(payload["base"])
    entries = {weight_key(name, current): entry for name, entry in payload["adapters"].items()}
    folded = {weight_key(name, current): entry for name, entry in merged["adapters"].items()}
    others: list[str] = []
    for key in sorted(wanted):
        expected = payload["base"].get(key, "")
        if key in stored:
            if stored[key].has(expected):
                state[key] = stored[key].weight.detach()
            else:
                others.append(key)
        elif (weight := cast_to_match(current.get(key), expected)) is not None:
            state[key] = weight
        elif not found and key in folded and merged["base"].get(key) == expected:
            state[key], _ = Adapter.from_state(folded[key]).folded_out_of(current[key])
        else:
            others.append(key)
    if not others:
        return
    if payload["form"] == "adapter":
        raise LoRAError(
            f"The checkpoint holds adapters only, and {listed(others)} of this module are not the weights they were"
            " trained on. Load the same pretrained weights first."
        )
    if quantized := [key for key in others if key in stored]:
        difference = _differ(payload["base"].get(quantized[0]), stored[quantized[0]].fingerprint())
        raise LoRAError(
            f"{listed(quantized)} of this module are quantised, and not what the checkpoint was trained on:"
            f" {difference}. What is quantised cannot be recovered from merged weights. Build the module on the same"
            " pretrained weights, quantised in the same way and on the same kind of device."
        )
    if any(key in payload["base"] for key in others):
        reason = f"The checkpoint was trained on other weights than this module has in {listed(others)}"
        remedy, with_error = "build the module on the same pretrained weights", "with an error"
        bases = [payload["base"].get(key, "") for key in others]
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
        if key in entries:  # else its adapter was trained by no optimizer, and is zero
            state[key], error = Adapter.from_state(entries[key]).folded_out_of(state[key])
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
    """In what two fingerprints differ, as far as it can be told."""
    if expected is None:
        return "it was trained with the increment in the weight"
    then, now = ("plain" if not is_quantized(value) else value.split(":")[2] for value in (expected, here))
    return f"that was {then}, this is {now}" if then != now else f"both are {now}, of other values"


def _keep_quantized(state: State, payload: State, stored: Mapping[str, Storage]) -> None:
    """Leaves quantised layers of a module without adapters as they are; merged weights do not go into them."""
    adapted = {weight_key(name, stored) for name in payload["adapters"]}
    others = [key for key in stored if key in adapted or not stored[key].has(payload["base"].get(key, ""))]
    if others:
        raise LoRAError(
            f"{listed(others)} of this module are quantised, and cannot hold the increments in the checkpoint. To"
            " evaluate it, load a file of `checkpoint='merged'` into the plain module, and quantise that if you like;"
            " or give it to the Trainer that ran `fit`, whose module is plain now."
        )
    state.update({key: layer.weight.detach() for key, layer in stored.items()})


def _check_same_adapters(payload: State, module: nn.Module, found: list[Place]) -> None:
    saved = payload["adapters"]
    here = {place.name: place.adapter for place in found}
    if missing := [name for name in saved if name not in here]:
        raise LoRAError(
            f"The checkpoint has adapters for {listed(missing)}, which this run does not adapt. Give the callback the"
            " options of the run that was saved."
        )
    idle = set(payload.get("idle", ()))
    if new := [name for name in here if name not in saved and name not in idle]:
        old = " In version 0.1.0 the default was `target_modules='all-linear'`." if payload["version"] == 1 else ""
        raise LoRAError(
            f"This run adapts {listed(new)}, for which the checkpoint has no adapters. Give the callback the options"
            f" of the run that was saved.{old}"
        )
    for name, entry in saved.items():
        given = here[name]
        tensors = given.saved()
        then_tensors = {field: entry[field] for field in tensors if field in entry}
        for what, now, then in (
            ("decomposition", given.decomposition, entry["decomposition"]),
            ("resample", given.resample, entry["resample"]),
            ("the seed and name", given.resample and given.key, given.resample and entry["key"]),
            ("rank", given.rank, entry["B"].shape[-2]),
            ("tensors", sorted(tensors), sorted(then_tensors)),
            ("shapes", _shapes(tensors), _shapes(then_tensors)),
            ("start", "zero" if given.A0 is None else "A0 B0", "A0 B0" if "A0" in entry else "zero"),
            ("a weight of shape", list(given.shape), entry["shape"]),
            ("transposed", given.transposed, entry["transposed"]),
            ("scale", given.scale, entry["scale"]),
            ("dtype", given.A.dtype, entry["B"].dtype),
        ):
            if now != then:
                raise LoRAError(
                    f"The adapter of {name!r} has {what} {then} in the checkpoint and {now} in this run. Give the"
                    " callback the options of the run that was saved."
                )
    names = trained_besides(module)
    then = payload.get("options")
    injected = next((injection.options for injection in injections(module)), None)
    same = isinstance(then, Mapping) and all(
        _listed_option(then.get(option)) == _listed_option(getattr(injected, option))
        for option in ("bias", "modules_to_save")
    )
    # what the module's own hooks train besides is no reason: a merged file has all weights
    if set(names) != set(payload["trained"]) and not (same and payload["form"] == "merged"):
        raise LoRAError(
            f"Besides the adapters, the checkpoint trained {listed(payload['trained'])} and this run trains"
            f" {listed(names)}. Give the callback the `bias` and `modules_to_save` of the run that was saved."
        )


def _listed_option(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensors[name].shape) for name in sorted(tensors)}


def cast_as(weight: Any, expected: str) -> Tensor | None:
    """Return ``weight`` in the dtype of the fingerprint ``expected``, as a precision may cast it; None if it cannot."""
    dtype = dtype_of(expected)
    if not isinstance(weight, Tensor) or not (dtype == weight.dtype or (dtype in NUMBERS and weight.dtype in NUMBERS)):
        return None
    return weight.to(dtype)


def cast_to_match(weight: Any, expected: str) -> Tensor | None:
    """Return ``weight``, cast as a precision may, if ``expected`` is its fingerprint then; else None."""
    cast = cast_as(weight, expected)
    return cast if cast is not None and fingerprint(cast) == expected else None
