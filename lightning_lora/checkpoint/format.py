"""What ``checkpoint["lightning_lora"]`` is, and whether what was read from a file is that.

``checkpoint["lightning_lora"]`` holds tensors and primitives only::

    version   of this format: until 2, a drawn A that is left out is of torch's generator, from 3 on of `counter.py`
    form      "merged": state_dict is that of the plain model; "adapter": only what was trained, and the buffers
    options   of the callback, to be read by people
    adapters  name of the module whose weight is adapted, or of any other parameter -> A, B, further tensors of its
              decomposition, shape, scale, transposed, decomposition, key, resample, steps, drawn_at; padding_idx,
              where an embedding has one; a drawn A that is not trained is left out
    trained   keys in state_dict of the base's parameters that are trained in full
    idle      names of adapters that no optimizer trains, from version 2 on: they are zero and left out
    average   beside a callback that averages weights: what `adapters` holds, of the average
    base      key in state_dict -> fingerprint of the frozen weight that stands there while training; a weight that
              holds its increment is not frozen, and is saved as it is; for a quantised weight, of what is stored, in a
              file that has it dequantised
    layers    name of an adapter -> the layer that it is in, for other formats; left out by earlier versions
"""

from __future__ import annotations

import itertools
import math
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lora.adapters import DECOMPOSITIONS, Adapter, draws
from lightning_lora.errors import LoRAError
from lightning_lora.injection.options import ADAPTER_DTYPES, CHECKPOINTS, RESAMPLES, check_choice
from lightning_lora.naming import plain_name
from lightning_lora.weights import Storage
from lightning_lora.weights.quantized import is_quantized

KEY = "lightning_lora"
VERSION = 3
NOTICE = (
    "the file holds LoRA adapters only, so build the module with its pretrained weights, and call"
    " lightning_lora.load_adapter(module, file), or give the file as `ckpt_path` to a Trainer with the LoRA callback"
)
"""A key in the state dict of a file of the form "adapter", with an empty tensor. Where such a file is loaded as if it
were a whole model, torch ends its error with the keys that the module does not expect: with this sentence."""
NUMBERS = tuple(getattr(torch, dtype) for dtype in ADAPTER_DTYPES)
"""The dtypes of what is computed with."""

State = dict[str, Any]


def check_format(payload: Any) -> None:
    """Raise unless ``payload``, read from a file, is what a run with LoRA writes.

    Draws that an earlier format left out of the file, and that were made by other random numbers, are filled in.

    Raises:
        LoRAError: If it is malformed, or of a newer format.
    """
    version: Any = payload.get("version") if isinstance(payload, Mapping) else None
    if not _is_int(version) or version < 1:
        raise _malformed("it has no version")
    if version > VERSION:
        raise LoRAError(
            f"The checkpoint's adapters are saved in format {version}; this version of lightning-lora reads"
            f" formats up to {VERSION}. Upgrade lightning-lora."
        )
    kinds = {"form": str, "adapters": Mapping, "trained": list, "base": Mapping}
    for field, kind in kinds.items():
        if not isinstance(payload.get(field), kind):
            raise _malformed(f"`{field}` is missing or no {kind.__name__}")
    check_choice(f"{KEY}.form", payload["form"], CHECKPOINTS)
    if not isinstance(payload.get("idle", []), list):
        raise _malformed("`idle` is no list")
    for field in ("adapters", "trained", "base"):
        if not all(isinstance(name, str) for name in payload[field]):
            raise _malformed(f"`{field}` is not a {kinds[field].__name__} of names")
    base = {plain_name(key) for key in payload["base"]}
    for name, entry in payload["adapters"].items():
        decomposition = entry.get("decomposition") if isinstance(entry, Mapping) else None
        if isinstance(decomposition, str):
            check_choice(f"{KEY}.adapters[{name!r}].decomposition", decomposition, tuple(DECOMPOSITIONS))
        if not isinstance(entry, Mapping) or not _is_adapter(entry) or not _fits_together(entry):
            raise _malformed(f"A, B, shape, scale, transposed of {name!r} do not fit")
        frozen = {name, f"{name}.weight"} & base
        if frozen and entry["resample"] is not None:
            raise _malformed(f"{name!r} is drawn anew and its weight in `base`")
        if not frozen and payload["form"] != "merged":
            raise _malformed(f"`base` has no weight for {name!r}")
    if "average" in payload and not _is_average(payload["average"], payload["adapters"]):
        raise _malformed("`average` holds no adapters like those in `adapters`")
    for key, expected in payload["base"].items():
        dtype = dtype_of(expected) if isinstance(expected, str) else None
        if dtype is None or (is_quantized(expected) and dtype not in NUMBERS):
            raise _malformed(f"the fingerprint of {key!r} is {expected if isinstance(expected, str) else 'no text'!r}")
        adapted = {plain_name(key), plain_name(key).removesuffix(".weight")} & {
            *payload["adapters"],
            *payload.get("idle", ()),
        }
        if payload["form"] != "adapter" and not adapted and not is_quantized(expected):
            raise _malformed(f"{key!r} in `base` has no adapter")
    if version <= 2:
        for entry in payload["adapters"].values():
            if entry["resample"] == "A" and "A" not in entry:
                entry["A"] = _drawn_by_format_2(entry)


def _drawn_by_format_2(entry: State) -> Tensor:
    B, shape = entry["B"], entry["shape"]
    n = shape[B.dim() - 2] if entry["transposed"] else math.prod(shape[B.dim() - 1 :])
    drawn = draws.normal_of_format_2(entry["key"], entry["drawn_at"], (*B.shape[:-1], n), B.shape[-2] ** -0.5)
    return drawn.to(B.dtype)


def check_weights(payload: State, state: Any, current: Mapping[str, Any], stored: Mapping[str, Storage]) -> None:
    """That increments are folded into weights of their shape, and out: those of the file and those of the module."""
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError("The checkpoint's `state_dict` is missing or no Mapping of names.")
    for weights in (state, current):
        keys = {name: weight_key(name, weights) for name in payload["adapters"]}
        for name, key in keys.items():
            weight, shape = weights.get(key), payload["adapters"][name]["shape"]
            if weight is not None and key not in stored and not (_is_number(weight) and list(weight.shape) == shape):
                raise ValueError(f"The adapter of {name!r} in the checkpoint is not one for the weight {key!r}.")
        if len(set(keys.values())) < len(keys):
            raise _malformed("a weight has two adapters")


def _malformed(what: str) -> ValueError:
    return ValueError(f"The checkpoint's `{KEY}` entry is malformed: {what}.")


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_number(tensor: Any) -> bool:
    """Whether ``tensor`` can be computed with: it is not sparse, nested, quantised, complex, or on the meta device."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.dtype in NUMBERS
        and not (tensor.is_meta or tensor.is_nested)
    )


def _is_adapter(entry: Mapping[Any, Any]) -> bool:
    """Whether ``entry`` has the fields of an adapter's state, each of its type and within its bounds."""
    kinds = {"B": Tensor, "shape": list, "scale": float, "transposed": bool, "decomposition": str, "key": str}
    if not all(isinstance(entry.get(field), kind) for field, kind in kinds.items()):
        return False
    tensors = {field: value for field, value in entry.items() if isinstance(value, Tensor)}
    if entry.keys() - {"padding_idx"} != {*kinds, *tensors, "resample", "steps", "drawn_at"}:
        return False
    resample, counts = entry["resample"], (entry["drawn_at"], entry["steps"])
    return (
        all(isinstance(name, str) and _is_number(tensor) for name, tensor in tensors.items())
        and (resample is None or (isinstance(resample, str) and resample in RESAMPLES))
        and all(_is_int(value) for value in (*counts, *entry["shape"], entry.get("padding_idx", 0)))
        and all(side > 0 for side in entry["shape"])
        and 0 <= counts[0] <= counts[1]
        and abs(entry["scale"]) <= torch.finfo(torch.float32).max  # which "not a number" is not
    )


def _fits_together(entry: Mapping[str, Any]) -> bool:
    """Whether the tensors of an adapter's state have the shapes that the weight's asks for, and one dtype."""
    tensors = {field: value for field, value in entry.items() if isinstance(value, Tensor)}
    kind, shape, B = DECOMPOSITIONS[entry["decomposition"]], entry["shape"], entry["B"]
    if B.dim() not in (2, 3) or B.dim() > len(shape):
        return False
    *stack, r = B.shape[:-1]
    m, n = shape[len(stack)], math.prod(shape[len(stack) + 1 :])
    m, n = (n, m) if entry["transposed"] else (m, n)
    sides = {"B": m, **({"A": n} if entry["resample"] != "A" else {})}
    if "A0" in tensors or "B0" in tensors:
        sides |= {"A0": n, "B0": m}
    shapes = {name: [*stack, r, side] for name, side in sides.items()} | {name: [*stack, m] for name in kind.per_output}
    if not 0 <= entry.get("padding_idx", 0) < n:
        return False
    if stack != shape[: len(stack)] or not 0 < r <= min(m, n) or not shapes.keys() <= tensors.keys():
        return False
    if any(list(tensors[name].shape) != expected for name, expected in shapes.items()):
        return False
    if any(tensors[name].dtype != B.dtype for name in sides):
        return False
    try:
        kind.check_shape("", m, n, r, "zero")
        return "A" not in sides or Adapter.from_state(entry) is not None
    except (ValueError, KeyError):  # no such rank; names that no parameter can have
        return False


def _is_average(average: Any, adapters: Mapping[str, Any]) -> bool:
    """Return whether ``average`` has an adapter like each of ``adapters``, which have been checked."""
    if not isinstance(average, Mapping) or average.keys() != adapters.keys():
        return False
    pairs = ((average[name], entry) for name, entry in adapters.items())
    return all(
        isinstance(mine, Mapping)
        and mine.keys() == entry.keys()
        and all(_is_alike(mine[field], value) for field, value in entry.items())
        for mine, entry in pairs
    )


def _is_alike(value: Any, other: Any) -> bool:
    """Return whether two values are equal, or tensors of one shape and dtype."""
    if isinstance(other, Tensor):
        return _is_number(value) and value.shape == other.shape and value.dtype == other.dtype
    return type(value) is type(other) and value == other


def weight_key(name: str, state: Mapping[str, Any]) -> str:
    """The key in ``state`` of the weight whose adapter is called ``name``."""
    names = (name, f"{name}.weight")
    found = (key for key in names if key in state)
    compiled = (key for key in state if plain_name(key) != key and plain_name(key) in names)
    return next(itertools.chain(found, compiled), names[1])


def dtype_of(expected: str) -> torch.dtype | None:
    """Return the dtype that the fingerprint ``expected`` begins with, or None."""
    dtype = vars(torch).get(expected.partition(":")[0])
    return dtype if isinstance(dtype, torch.dtype) else None


def damage(path: Any) -> str | None:
    """What is wrong with the zip archive that ``torch.save`` has written to ``path``."""
    if path is None or not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        begins = b"PK\x03\x04".startswith(file.read(4))
    if not zipfile.is_zipfile(path):
        return "truncated" if begins else None
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except Exception:  # whatever is raised for headers that make no sense
        return "damaged: its table of contents cannot be read"
    return None if part is None else f"damaged: the checksum of its part {part!r} is wrong"
