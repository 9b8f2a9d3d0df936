"""A checkpoint's dictionary: merged on its way out, taken apart again on its way in.

Everything here works on the dictionary, never on the module's own state: other callbacks may have put another model
there, and a sharding strategy puts full tensors there on rank 0 and nothing elsewhere.

``checkpoint["lightning_lora"]`` holds tensors and primitives only::

    version   of this format
    form      "merged": state_dict is that of the plain model; "adapter": only what was trained, and the buffers
    options   of the callback, to be read by people
    adapters  name of the adapted module -> its A, B, scale, transposed
    trained   names of the base's parameters that are trained in full
    base      key in state_dict -> fingerprint of the frozen weight that stands there while training
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_lora.adapters import Adapter
from lightning_lora.hosts import LinearHost
from lightning_lora.inject import trained_besides
from lightning_lora.options import CHECKPOINTS, Options, check_choice

KEY = "lightning_lora"
VERSION = 1

State = dict[str, Any]


def fingerprint(weight: Tensor) -> str:
    """The dtype of ``weight`` and the SHA-256 of its shape and bytes, as ``"float32:9f86..."``."""
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return f"{str(weight.dtype).removeprefix('torch.')}:{digest.hexdigest()}"


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

    What is left in ``state`` is the base model's: its keys, with W0 where the adapters were.
    """
    adapters = {name: adapter.state() for name, adapter in _pop_adapters(state, module)}
    trained = [name for name in trained_besides(module) if name in state]
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    frozen = [key for key in state if key in parameters and key not in trained]
    base = frozen if form == "adapter" else [f"{name}.weight" for name in adapters]
    return {
        "version": VERSION,
        "form": form,
        "options": options.to_primitives(),
        "adapters": adapters,
        "trained": trained,
        "base": {key: fingerprints.of(key, state[key]) for key in base if key in state},
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
        key = f"{name}.weight"
        if key in state:
            weight = state[key]
            place = weight.data_ptr()
            if place not in folded:
                folded[place] = Adapter.from_state(entry).folded_into(weight)
            state[key] = folded[place]


def take_in(checkpoint: State, module: nn.Module, exact: bool) -> None:
    """Turns ``checkpoint["state_dict"]``, as read from a file, into the state that ``module`` is to load.

    An adapted module gets W0, A and B; a plain one gets merged weights. A checkpoint without adapters stays as it is.

    Args:
        checkpoint: Lightning's dictionary; its ``state_dict`` is replaced.
        module: The LightningModule, adapted or plain, with the weights that its own code gave it.
        exact: Whether to refuse a merged checkpoint whose W0 ``module`` does not have, instead of recovering W0.

    Raises:
        ValueError: If the adapters in the file are malformed.
        MisconfigurationException: If they are not those of this run, or stand on other weights.
    """
    if (payload := checkpoint.get(KEY)) is None:
        return
    _check_format(payload)
    state = dict(checkpoint["state_dict"])
    hosts = _host_names(module)
    if hosts:
        _check_same_adapters(payload, module, hosts)
    if hosts or payload["form"] == "adapter":
        _put_base_back(state, payload, module, exact)
        if hosts:
            for name, entry in payload["adapters"].items():
                state[f"{name}.lora.A"], state[f"{name}.lora.B"] = entry["A"], entry["B"]
        else:
            fold(state, payload)
    checkpoint["state_dict"] = state


def _put_base_back(state: State, payload: State, module: nn.Module, exact: bool) -> None:
    """W0 into ``state``: the module's own where its fingerprint is that in the file, else recovered from the merged."""
    current = module.state_dict()
    others: list[str] = []
    for key, expected in payload["base"].items():
        dtype = _dtype_of(expected)
        if key in current and fingerprint(current[key].to(dtype)) == expected:
            state[key] = current[key].to(dtype)
        else:
            others.append(key)
    if not others:
        return
    if payload["form"] == "adapter":
        raise MisconfigurationException(
            f"The checkpoint holds adapters only, and {_listed(others)} of this module are not the weights they were"
            " trained on. Load the same pretrained weights first."
        )
    if exact:
        raise MisconfigurationException(
            f"The checkpoint was trained on other weights than this module has in {_listed(others)}, and"
            " `exact_resume=True` was asked for. Build the module on the same pretrained weights, or allow W0 to be"
            " recovered from the merged weights by `exact_resume=False`."
        )
    bound = 0.0
    for key in others:
        if key in state:
            adapter = Adapter.from_state(payload["adapters"][key.removesuffix(".weight")])
            state[key], error = adapter.folded_out_of(state[key])
            bound = max(bound, 1.05 * error)  # what is printed, two digits, is still a bound
    rank_zero_warn(
        f"The checkpoint was trained on other weights than this module has in {_listed(others)}. W0 was recovered from"
        f" the merged weights, with an error of at most {bound:.1e} in any entry, so the run that resumes is close to"
        " the one that was saved but not bitwise equal. To resume exactly, build the module on the same pretrained"
        " weights; `exact_resume=True` makes this an error."
    )


def _pop_adapters(state: State, module: nn.Module) -> Iterator[tuple[str, Adapter]]:
    for name, host in _host_names(module).items():
        if f"{name}.lora.A" in state:
            A, B = state.pop(f"{name}.lora.A"), state.pop(f"{name}.lora.B")
            yield name, Adapter.from_state({**host.lora.state(), "A": A, "B": B})
        getattr(state, "_metadata", {}).pop(f"{name}.lora", None)


def _host_names(module: nn.Module) -> dict[str, LinearHost]:
    """Every name under which a module with an adapter stands in ``module``; one that stands in two places has two."""
    return {
        name: child for name, child in module.named_modules(remove_duplicate=False) if isinstance(child, LinearHost)
    }


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
        factors: list[Any] = [entry.get("A"), entry.get("B")] if isinstance(entry, Mapping) else []
        if not factors or not all(isinstance(f, Tensor) and f.dim() == 2 and f.is_floating_point() for f in factors):
            raise ValueError(f"The checkpoint's `{KEY}` entry is malformed: {name!r} has no matrices A and B.")
        primitives = isinstance(entry.get("scale"), float) and isinstance(entry.get("transposed"), bool)
        if factors[0].shape[0] != factors[1].shape[0] or not primitives:
            raise ValueError(
                f"The checkpoint's `{KEY}` entry is malformed: A, B, scale and transposed of {name!r} do not fit."
            )
    for key, expected in payload["base"].items():
        if not isinstance(expected, str) or not isinstance(_dtype_of(expected), torch.dtype):
            raise ValueError(
                f"The checkpoint's `{KEY}` entry is malformed: the fingerprint of {key!r} is {expected!r}."
            )
        if payload["form"] == "merged" and key.removesuffix(".weight") not in payload["adapters"]:
            raise ValueError(f"The checkpoint's `{KEY}` entry is malformed: {key!r} in `base` has no adapter.")


def _check_same_adapters(payload: State, module: nn.Module, hosts: Mapping[str, LinearHost]) -> None:
    saved = payload["adapters"]
    if missing := [name for name in saved if name not in hosts]:
        raise MisconfigurationException(
            f"The checkpoint has adapters for {_listed(missing)}, which this run does not adapt. Give the callback the"
            " options of the run that was saved."
        )
    if new := [name for name in hosts if name not in saved]:
        raise MisconfigurationException(
            f"This run adapts {_listed(new)}, for which the checkpoint has no adapters. Give the callback the options"
            " of the run that was saved."
        )
    for name, host in hosts.items():
        given, entry = host.lora, saved[name]
        for what, here, there in (
            ("rank", given.rank, entry["A"].shape[0]),
            ("shapes", (given.A.shape, given.B.shape), (entry["A"].shape, entry["B"].shape)),
            ("scale", given.scale, entry["scale"]),
            ("dtype", given.A.dtype, entry["A"].dtype),
        ):
            if here != there:
                raise MisconfigurationException(
                    f"The adapter of {name!r} has {what} {there} in the checkpoint and {here} in this run. Give the"
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
