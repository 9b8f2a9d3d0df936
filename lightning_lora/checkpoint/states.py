"""A checkpoint's dictionary: merged on its way out, taken apart again on its way in.

Everything here works on the dictionary, never on the module's own state: other callbacks may have put another model
there, and a sharding strategy puts full tensors there on rank 0 and nothing elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.adapters import Adapter, draws
from lightning_lora.checkpoint.format import (
    KEY,
    NUMBERS,
    VERSION,
    State,
    check_format,
    check_weights,
    dtype_of,
    weight_key,
)
from lightning_lora.errors import LoRAError, warn
from lightning_lora.injection.inject import Place, places, trained_besides
from lightning_lora.injection.naming import state_key
from lightning_lora.injection.options import Options
from lightning_lora.weights import sharded as shards
from lightning_lora.weights.quantized import Storage, is_quantized, storages, without_extras
from lightning_lora.weights.sharded_adapters import gathered


def fingerprint(weight: Tensor) -> str:
    """The dtype, shape and SHA-256 of ``weight``, as ``"float32:64x32:9f86..."``."""
    dtype, shape = str(weight.dtype).removeprefix("torch."), "x".join(map(str, weight.shape))
    return f"{dtype}:{shape}:{draws.digest(weight)}"


class Fingerprints:
    """Fingerprints of frozen weights, each computed once for as long as its weight is not written to."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, int, bool], str]] = {}

    def of(
        self, key: str, state: Mapping[str, Tensor], part: Tensor | None = None, stored: Storage | None = None
    ) -> str:
        """That of the weight ``state[key]``, of which this process holds ``part`` if it is sharded.

        Of a quantised weight, that of what is ``stored``.
        """
        held = stored.tensors()[0] if stored is not None else state[key] if part is None else part
        gathers = isinstance(state, shards.Whole)  # so that all processes know it, or none
        seen = held.data_ptr(), held._version, gathers
        if key not in self._known or self._known[key][0] != seen:
            self._known[key] = seen, fingerprint(state[key]) if stored is None else stored.fingerprint()
        return self._known[key][1]


def take_apart(
    state: MutableMapping[str, Any], module: nn.Module, options: Options, form: str, fingerprints: Fingerprints
) -> State:
    """Removes the adapters from ``state``, an adapted module's, and returns what ``checkpoint["lightning_lora"]`` is.

    What is left in ``state`` is the base model's: its keys, with what the weights hold while training.

    Raises:
        LoRAError: If ``state`` has an adapter and not its weight.
    """
    adapters: State = {}
    frozen: dict[str, Tensor | None] = {}
    for place in places(module):
        if f"{place.factors}A" in state:
            if place.key not in state:
                raise LoRAError(
                    f"`checkpoint['state_dict']` has the adapter of {place.key!r} and not the weight, which a callback"
                    " has taken out in `on_save_checkpoint`: it can neither be merged nor be told from others. Leave"
                    " out what is frozen by `LoRA(checkpoint='adapter')`, not by a callback."
                )
            tensors = {name: state.pop(f"{place.factors}{name}") for name in place.adapter.state_dict()}
            weight = state[place.key] if place.adapter.rescales else place.weight  # to gather it costs
            adapters[place.name] = place.adapter.with_tensors(tensors).state(weight)
            if not place.host.holds_increment:
                frozen[place.key] = shards.part(place.weight)
    metadata = getattr(state, "_metadata", {})
    inside = tuple(place.factors.partition("lora.")[0] + "lora." for place in places(module))
    for path in [path for path in metadata if f"{state_key(path)}.".startswith(inside)]:
        del metadata[path]
    trained = [name for name in trained_besides(module) if name in state]
    if form == "adapter":
        parameters = {state_key(name) for name, _ in module.named_parameters(remove_duplicate=False)}
        frozen = {key: None for key in state if key in parameters and key not in trained}
    stored = storages(module)
    frozen |= {key: None for key in stored if key in state and key not in frozen}
    return {
        "version": VERSION,
        "form": form,
        "options": options.to_primitives(),
        "adapters": adapters,
        "trained": trained,
        "base": {key: fingerprints.of(key, state, part, stored.get(key)) for key, part in frozen.items()},
    }


def merged_parts(state: State, module: nn.Module, options: Options, fingerprints: Fingerprints) -> tuple[State, State]:
    """The merged state of which each process holds the parts that it is to write, and ``checkpoint["lightning_lora"]``.

    All processes call this together: A, B, and one after another the frozen weights are gathered.

    Args:
        state: That of the adapted ``module``, in parts. It is left as it is.
        module, options, fingerprints: As for :func:`take_apart`.
    """
    whole = shards.Whole(state)
    payload = take_apart(whole, module, options, "merged", fingerprints)
    fold(whole, payload)
    return whole.parts, payload


def put_out(state: State, payload: State, stored: Mapping[str, Storage] | None = None, merged: bool = False) -> None:
    """Makes ``state``, a base model's, what is written to the file: merged, or without all that is frozen.

    Args:
        state: Changed in place.
        payload: What :func:`take_apart` made of it.
        stored: The quantised weights of the module that it is of.
        merged: Whether the increments are in the weights already, so that only quantised ones without are to be made
            plain.
    """
    stored = stored or {}
    without_extras(state, stored)
    if payload["form"] == "adapter":
        for key in payload["base"]:
            state.pop(key, None)
        return
    if not merged:
        fold(state, payload, stored)
    adapted = set() if merged else {weight_key(name, state) for name in payload["adapters"]}
    for key in (stored.keys() & state.keys()) - adapted:
        state[key] = stored[key].dequantized().to(stored[key].dtype)


def fold(state: MutableMapping[str, Any], payload: State, stored: Mapping[str, Storage] | None = None) -> None:
    """Folds the increments of ``payload`` into the weights W0 in ``state``, once for weights that share storage."""
    folded: dict[int, Tensor] = {}
    for name, entry in payload["adapters"].items():
        if (key := weight_key(name, state)) in payload["base"]:
            layer = (stored or {}).get(key)
            held = state[key] if layer is None else layer.tensors()[0]
            if isinstance(state, shards.Whole):  # what it gives has no place of its own
                folded.clear()
            if held.data_ptr() not in folded:
                weight = held if layer is None else layer.dequantized()
                folded[held.data_ptr()] = Adapter.from_state(entry).folded_into(weight).to((layer or weight).dtype)
            state[key] = folded[held.data_ptr()]


def take_in(checkpoint: State, module: nn.Module, exact: bool, held: State | None = None) -> None:
    """Turns ``checkpoint["state_dict"]``, as read from a file, into the state that ``module`` is to load.

    An adapted module gets W0, A and B; a plain one gets merged weights. A checkpoint without adapters stays as it is.

    Args:
        checkpoint: Lightning's dictionary; its ``state_dict`` is replaced.
        module: The LightningModule, adapted or plain, with the weights that its own code gave it.
        exact: Whether to refuse a merged checkpoint whose W0 ``module`` does not have, instead of recovering W0.
        held: The ``checkpoint["lightning_lora"]`` whose increments are folded into the weights of a plain ``module``.

    Raises:
        ValueError: If the adapters in the file are malformed.
        LoRAError: If they are not those of this run, or stand on other weights.
    """
    if (payload := checkpoint.get(KEY)) is None:
        return
    check_format(payload)
    found = list(places(module))
    stored = storages(module)
    current = module.state_dict() if found or payload["form"] == "adapter" else {}
    check_weights(payload, checkpoint.get("state_dict"), current, stored)
    state = dict(checkpoint["state_dict"])
    if not found:
        _keep_quantized(state, payload, stored)
    if found:
        _check_same_adapters(payload, module, found)
    if found or payload["form"] == "adapter":
        _put_base_back(state, payload, current, found, exact, held or {"base": {}, "adapters": {}}, stored)
    for place in found:
        for name, value in place.adapter.resume(payload["adapters"][place.name]).items():
            state[f"{place.factors}{name}"] = value
    if not found and payload["form"] != "merged":
        fold(state, payload)
    checkpoint["state_dict"] = state


def take_in_shards(checkpoint: State, module: nn.Module, exact: bool, before: Mapping[str, Tensor]) -> None:
    """:func:`take_in` where the weights of the file have been loaded into the parts of ``module`` already.

    All processes call this together. One weight after another is gathered.

    Args:
        checkpoint: The rest of Lightning's dictionary, without ``state_dict``.
        module: The LightningModule, adapted or plain.
        exact: As for :func:`take_in`.
        before: Key in the state of ``module`` -> what this process held of that weight before it was loaded.
    """
    if (payload := checkpoint.get(KEY)) is None:
        return
    check_format(payload)
    shards.reshard(module)
    state = shards.Whole(module.state_dict(), in_place=True)
    if not (found := list(places(module))):
        return
    _check_same_adapters(payload, module, found)
    _put_base_back(state, payload, shards.Whole(before), found, exact, {"base": {}, "adapters": {}}, {})
    for place in found:
        with gathered(place.adapter) as whole:
            tensors = whole.resume(payload["adapters"][place.name])
        for name, value in tensors.items():
            state[f"{place.factors}{name}"] = value


def _put_base_back(
    state: MutableMapping[str, Any],
    payload: State,
    current: Mapping[str, Tensor],
    found: list[Place],
    exact: bool,
    held: State,
    stored: Mapping[str, Storage],
) -> None:
    """W0 into ``state`` wherever a module keeps W0: ``current`` if that has the file's fingerprint, else recovered."""
    wanted = {place.key for place in found if not place.host.holds_increment} | stored.keys()
    if payload["form"] == "adapter":
        wanted |= set(payload["base"])
    entries = {weight_key(name, current): entry for name, entry in payload["adapters"].items()}
    folded = {weight_key(name, current): entry for name, entry in held["adapters"].items()}
    others: list[str] = []
    for key in sorted(wanted):
        expected = payload["base"].get(key, "")
        if key in stored:
            if stored[key].has(expected):
                state[key] = stored[key].weight.detach()
            else:
                others.append(key)
        elif (weight := _cast(current.get(key), expected)) is not None and fingerprint(weight) == expected:
            state[key] = weight
        elif not found and key in folded and held["base"].get(key) == expected:
            state[key], _ = Adapter.from_state(folded[key]).folded_out_of(current[key])
        else:
            others.append(key)
    if not others:
        return
    if payload["form"] == "adapter":
        raise LoRAError(
            f"The checkpoint holds adapters only, and {_listed(others)} of this module are not the weights they were"
            " trained on. Load the same pretrained weights first."
        )
    if quantized := [key for key in others if key in stored]:
        difference = _differ(payload["base"].get(quantized[0]), stored[quantized[0]].fingerprint())
        raise LoRAError(
            f"{_listed(quantized)} of this module are quantised, and not what the checkpoint was trained on:"
            f" {difference}. What is quantised cannot be recovered from merged weights. Build the module on the same"
            " pretrained weights, quantised in the same way and on the same kind of device."
        )
    if any(key in payload["base"] for key in others):
        reason = f"The checkpoint was trained on other weights than this module has in {_listed(others)}"
        remedy, with_error = "build the module on the same pretrained weights", "with an error"
        bases = [payload["base"].get(key, "") for key in others]
        if kinds := sorted({base.split(":")[2] for base in bases if is_quantized(base)}):
            remedy += f", quantised as they were ({', '.join(kinds)}; `pip install 'lightning-lora[quantization]'`)"
    else:
        reason = f"The checkpoint's run held the increments in the weights, and this one needs W0 in {_listed(others)}"
        # what each step was rounded by stays in W0
        remedy, with_error = "use the `gradient` of the run that was saved", "and gives them back with an error"
    if exact:
        raise LoRAError(
            f"{reason}, and `exact_resume=True` was asked for. To resume exactly, {remedy}, or allow W0 to be recovered"
            " from the merged weights by `exact_resume=False`."
        )
    bound = 0.0
    for key in others:
        if key in state:
            state[key], error = Adapter.from_state(entries[key]).folded_out_of(state[key])
            bound = max(bound, 1.05 * error)  # what is printed, two digits, is still a bound
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
            f"{_listed(others)} of this module are quantised, and cannot hold the increments in the checkpoint. To"
            " evaluate it, load a file of `checkpoint='merged'` into the plain module, and quantise that if you like;"
            " or give it to the Trainer that ran `fit`, whose module is plain now."
        )
    state.update({key: layer.weight.detach() for key, layer in stored.items()})


def _check_same_adapters(payload: State, module: nn.Module, found: list[Place]) -> None:
    saved = payload["adapters"]
    here = {place.name: place.adapter for place in found}
    if missing := [name for name in saved if name not in here]:
        raise LoRAError(
            f"The checkpoint has adapters for {_listed(missing)}, which this run does not adapt. Give the callback the"
            " options of the run that was saved."
        )
    if new := [name for name in here if name not in saved]:
        raise LoRAError(
            f"This run adapts {_listed(new)}, for which the checkpoint has no adapters. Give the callback the options"
            " of the run that was saved."
        )
    for name, given in here.items():
        entry = saved[name]
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
    if set(names) != set(payload["trained"]):
        raise LoRAError(
            f"Besides the adapters, the checkpoint trained {_listed(payload['trained'])} and this run trains"
            f" {_listed(names)}. Give the callback the `bias` and `modules_to_save` of the run that was saved."
        )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensors[name].shape) for name in sorted(tensors)}


def _cast(weight: Any, expected: str) -> Tensor | None:
    """``weight`` in the dtype of the fingerprint ``expected``, as a precision may cast it later; None if it cannot."""
    dtype = dtype_of(expected)
    if not isinstance(weight, Tensor) or not (dtype == weight.dtype or (dtype in NUMBERS and weight.dtype in NUMBERS)):
        return None
    return weight.to(dtype)


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    shown = ", ".join(map(repr, names[:most])) or "nothing"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
