"""A checkpoint's dictionary: merged on its way out, taken apart again on its way in.

Everything here works on the dictionary, never on the module's own state: other callbacks may have put another model
there, and a sharding strategy puts full tensors there on rank 0 and nothing elsewhere.

``checkpoint["lightning_lora"]`` holds tensors and primitives only::

    version   of this format
    form      "merged": state_dict is that of the plain model; "adapter": only what was trained, and the buffers
    options   of the callback, to be read by people
    adapters  name of the module whose weight is adapted, or of any other parameter -> A, B, shape, scale, transposed
    trained   names of the base's parameters that are trained in full
    base      key in state_dict -> fingerprint of the frozen weight that stands there while training; a weight that
              holds its increment is not frozen, and is saved as it is
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_lora import draws
from lightning_lora.adapters import Adapter
from lightning_lora.inject import Place, places, trained_besides
from lightning_lora.options import CHECKPOINTS, Options, check_choice

KEY = "lightning_lora"
VERSION = 1

State = dict[str, Any]


def fingerprint(weight: Tensor) -> str:
    """The dtype, shape and SHA-256 of ``weight``, as ``"float32:64x32:9f86..."``."""
    dtype, shape = str(weight.dtype).removeprefix("torch."), "x".join(map(str, weight.shape))
    return f"{dtype}:{shape}:{draws.digest(weight)}"


class Fingerprints:
    """Fingerprints of frozen weights, each computed once for as long as its weight is not written to."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, int], str]] = {}

    def of(self, key: str, weight: Tensor) -> str:
        state = weight.data_ptr(), weight._version
        if key not in self._known or self._known[key][0] != state:
            self._known[key] = state, fingerprint(weight)
        return self._known[key][1]


def take_apart(state: State, module: nn.Module, options: Options, form: str, fingerprints: Fingerprints) -> State:
    """Removes the adapters from ``state``, an adapted module's, and returns what ``checkpoint["lightning_lora"]`` is.

    What is left in ``state`` is the base model's: its keys, with what the weights hold while training.
    """
    adapters: State = {}
    frozen: list[str] = []
    for place in places(module):
        if f"{place.factors}A" in state:
            factors = {factor: state.pop(f"{place.factors}{factor}") for factor in "AB"}
            adapters[place.name] = {**place.adapter.state(), **factors}
            if not place.host.holds_increment:
                frozen.append(place.key)
        for inner, _ in place.host.lora.named_modules(prefix=place.factors.partition("lora.")[0] + "lora"):
            getattr(state, "_metadata", {}).pop(inner, None)
    trained = [name for name in trained_besides(module) if name in state]
    if form == "adapter":
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        frozen = [key for key in state if key in parameters and key not in trained]
    return {
        "version": VERSION,
        "form": form,
        "options": options.to_primitives(),
        "adapters": adapters,
        "trained": trained,
        "base": {key: fingerprints.of(key, state[key]) for key in frozen},
    }


def put_out(state: State, payload: State) -> None:
    """Makes ``state``, a base model's, what is written to the file: merged, or without all that is frozen."""
    if payload["form"] == "adapter":
        for key in payload["base"]:
            state.pop(key, None)
        return
    fold(state, payload)


def fold(state: State, payload: State) -> None:
    """Folds the increments of ``payload`` into the weights W0 in ``state``, once for weights that share storage."""
    folded: dict[int, Tensor] = {}
    for name, entry in payload["adapters"].items():
        if (key := weight_key(name, state)) in payload["base"]:
            weight = state[key]
            place = weight.data_ptr()
            if place not in folded:
                folded[place] = Adapter.from_state(entry).folded_into(weight)
            state[key] = folded[place]


def weight_key(name: str, state: Mapping[str, Any]) -> str:
    """The key in ``state`` of the weight whose adapter is called ``name``."""
    return name if name in state else f"{name}.weight"


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
        MisconfigurationException: If they are not those of this run, or stand on other weights.
    """
    if (payload := checkpoint.get(KEY)) is None:
        return
    _check_format(payload)
    state = dict(checkpoint["state_dict"])
    found = list(places(module))
    if found:
        _check_same_adapters(payload, module, found)
    if found or payload["form"] == "adapter":
        _put_base_back(state, payload, module, found, exact, held or {"base": {}, "adapters": {}})
    for place in found:
        for factor in "AB":
            state[f"{place.factors}{factor}"] = payload["adapters"][place.name][factor]
    if not found and payload["form"] == "adapter":
        fold(state, payload)
    checkpoint["state_dict"] = state


def _put_base_back(
    state: State, payload: State, module: nn.Module, found: list[Place], exact: bool, held: State
) -> None:
    """W0 into ``state`` wherever ``module`` keeps W0: its own if that has the file's fingerprint, else recovered."""
    wanted = {place.key for place in found if not place.host.holds_increment}
    if payload["form"] == "adapter":
        wanted |= set(payload["base"])
    current = module.state_dict()
    entries = {weight_key(name, current): entry for name, entry in payload["adapters"].items()}
    folded = {weight_key(name, current): entry for name, entry in held["adapters"].items()}
    others: list[str] = []
    for key in sorted(wanted):
        expected = payload["base"].get(key, "")
        if key in current and fingerprint(current[key].to(_dtype_of(expected))) == expected:
            state[key] = current[key].to(_dtype_of(expected))
        elif not found and key in folded and held["base"].get(key) == expected:
            state[key], _ = Adapter.from_state(folded[key]).folded_out_of(current[key])
        else:
            others.append(key)
    if not others:
        return
    if payload["form"] == "adapter":
        raise MisconfigurationException(
            f"The checkpoint holds adapters only, and {_listed(others)} of this module are not the weights they were"
            " trained on. Load the same pretrained weights first."
        )
    if any(key in payload["base"] for key in others):
        reason = f"The checkpoint was trained on other weights than this module has in {_listed(others)}"
        remedy, with_error = "build the module on the same pretrained weights", "with an error"
    else:
        reason = f"The checkpoint's run held the increments in the weights, and this one needs W0 in {_listed(others)}"
        # what each step was rounded by stays in W0
        remedy, with_error = "use the `gradient` of the run that was saved", "and gives them back with an error"
    if exact:
        raise MisconfigurationException(
            f"{reason}, and `exact_resume=True` was asked for. To resume exactly, {remedy}, or allow W0 to be recovered"
            " from the merged weights by `exact_resume=False`."
        )
    bound = 0.0
    for key in others:
        if key in state:
            state[key], error = Adapter.from_state(entries[key]).folded_out_of(state[key])
            bound = max(bound, 1.05 * error)  # what is printed, two digits, is still a bound
    rank_zero_warn(
        f"{reason}. W0 was recovered from the merged weights, {with_error} of at most {bound:.1e} in any entry, so"
        f" the run that resumes is close to the one that was saved but not bitwise equal. To resume exactly, {remedy};"
        " `exact_resume=True` makes this an error."
    )


def _check_format(payload: Any) -> None:
    """That ``payload``, read from a file, is what :func:`take_apart` makes."""
    version = payload.get("version") if isinstance(payload, Mapping) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"The checkpoint's `{KEY}` entry is malformed: it has no version.")
    if version > VERSION:
        raise MisconfigurationException(
            f"The checkpoint's adapters are saved in format {version}; this version of lightning-lora reads"
            f" formats up to {VERSION}. Upgrade lightning-lora."
        )
    kinds = {"form": str, "adapters": Mapping, "trained": list, "base": Mapping}
    for field, kind in kinds.items():
        if not isinstance(payload.get(field), kind):
            raise ValueError(
                f"The checkpoint's `{KEY}` entry is malformed: `{field}` is missing or no {kind.__name__}."
            )
    check_choice(f"{KEY}.form", payload["form"], CHECKPOINTS)
    if not all(isinstance(name, str) for name in payload["trained"]):
        raise ValueError(f"The checkpoint's `{KEY}` entry is malformed: `trained` is not a list of names.")
    for name, entry in payload["adapters"].items():
        if not isinstance(entry, Mapping) or not _is_adapter(entry):
            raise ValueError(
                f"The checkpoint's `{KEY}` entry is malformed: A, B, shape, scale, transposed of {name!r} do not fit."
            )
    for key, expected in payload["base"].items():
        if not isinstance(expected, str) or not isinstance(_dtype_of(expected), torch.dtype):
            raise ValueError(
                f"The checkpoint's `{KEY}` entry is malformed: the fingerprint of {key!r} is {expected!r}."
            )
        if payload["form"] == "merged" and not {key, key.removesuffix(".weight")} & payload["adapters"].keys():
            raise ValueError(f"The checkpoint's `{KEY}` entry is malformed: {key!r} in `base` has no adapter.")


def _is_adapter(entry: Mapping[str, Any]) -> bool:
    """Whether the fields of ``entry`` have their types, and A and B the shapes that the weight's asks for."""
    kinds = {"A": Tensor, "B": Tensor, "shape": list, "scale": float, "transposed": bool}
    if entry.keys() != kinds.keys() or not all(isinstance(entry[field], kind) for field, kind in kinds.items()):
        return False
    A, B, shape = entry["A"], entry["B"], entry["shape"]
    if not all(isinstance(side, int) and side > 0 for side in shape) or A.dim() not in (2, 3) or A.dim() > len(shape):
        return False
    if not math.isfinite(entry["scale"]):
        return False
    stack, m, n = shape[: A.dim() - 2], shape[A.dim() - 2], math.prod(shape[A.dim() - 1 :])
    m, n = (n, m) if entry["transposed"] else (m, n)
    fits = list(A.shape) == [*stack, A.shape[-2], n] and list(B.shape) == [*stack, A.shape[-2], m]
    return fits and A.is_floating_point() and A.dtype == B.dtype


def _check_same_adapters(payload: State, module: nn.Module, found: list[Place]) -> None:
    saved = payload["adapters"]
    here = {place.name: place.adapter for place in found}
    if missing := [name for name in saved if name not in here]:
        raise MisconfigurationException(
            f"The checkpoint has adapters for {_listed(missing)}, which this run does not adapt. Give the callback the"
            " options of the run that was saved."
        )
    if new := [name for name in here if name not in saved]:
        raise MisconfigurationException(
            f"This run adapts {_listed(new)}, for which the checkpoint has no adapters. Give the callback the options"
            " of the run that was saved."
        )
    for name, given in here.items():
        entry = saved[name]
        for what, now, then in (
            ("rank", given.rank, entry["A"].shape[-2]),
            (
                "shapes",
                [tuple(given.A.shape), tuple(given.B.shape)],
                [tuple(entry["A"].shape), tuple(entry["B"].shape)],
            ),
            ("scale", given.scale, entry["scale"]),
            ("dtype", given.A.dtype, entry["A"].dtype),
        ):
            if now != then:
                raise MisconfigurationException(
                    f"The adapter of {name!r} has {what} {then} in the checkpoint and {now} in this run. Give the"
                    " callback the options of the run that was saved."
                )
    names = trained_besides(module)
    if set(names) != set(payload["trained"]):
        raise MisconfigurationException(
            f"Besides the adapters, the checkpoint trained {_listed(payload['trained'])} and this run trains"
            f" {_listed(names)}. Give the callback the `bias` and `modules_to_save` of the run that was saved."
        )


def _dtype_of(expected: str) -> torch.dtype:
    return getattr(torch, expected.partition(":")[0], None)  # type: ignore[return-value]


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    shown = ", ".join(map(repr, names[:most])) or "nothing"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
