"""What ``checkpoint["lightning_lora"]`` is, and the door through which it comes in: checked once, a dataclass after.

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

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lora.adapters import DECOMPOSITIONS, Adapter, AdapterState, draws
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
FIELDS = {"form": str, "adapters": Mapping, "trained": list, "base": Mapping, "idle": list}
"""The fields that are checked -> their types."""
ADAPTER_FIELDS: dict[str, tuple[type, ...]] = {
    "decomposition": (str,),
    "shape": (list,),
    "scale": (float,),
    "transposed": (bool,),
    "resample": (str, type(None)),
    "key": (str,),
    "steps": (int,),
    "drawn_at": (int,),
    "padding_idx": (int, type(None)),
}
"""The fields of an adapter that are no tensors -> their types."""

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A ``checkpoint["lightning_lora"]`` that is known to be one; fields as in this file's first lines."""

    form: str
    adapters: dict[str, AdapterState]
    trained: list[str]
    base: dict[str, str]
    idle: list[str] = dataclasses.field(default_factory=list)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    layers: dict[str, str] = dataclasses.field(default_factory=dict)
    average: dict[str, AdapterState] | None = None
    version: int = VERSION

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> SavedRun | None:
        """Return what ``checkpoint`` says of a run; None if it says nothing."""
        payload = checkpoint.get(KEY)
        return None if payload is None else cls.from_mapping(payload)

    @classmethod
    def from_mapping(cls, payload: Any) -> SavedRun:
        """Return what ``payload``, read from a file, says.

        Draws that an earlier format left out of the file, and that were made by other random numbers, are filled in.

        Raises:
            LoRAError: If it is not what a run with LoRA writes, or of a newer format.
        """
        version: Any = payload.get("version") if isinstance(payload, Mapping) else None
        if not _is_int(version) or version < 1:
            raise _malformed("it has no version")
        if version > VERSION:
            raise LoRAError(
                f"The checkpoint's adapters are saved in format {version}; this version of lightning-lora reads"
                f" formats up to {VERSION}. Upgrade lightning-lora."
            )
        payload = {"idle": [], **payload}
        for field, kind in FIELDS.items():
            if not isinstance(payload.get(field), kind):
                raise _malformed(f"`{field}` is missing or no {kind.__name__}")
            if not all(isinstance(name, str) for name in payload[field]):
                raise _malformed(f"`{field}` is not a {kind.__name__} of names")
        check_choice(f"{KEY}.form", payload["form"], CHECKPOINTS)
        adapters = {name: _adapter(name, entry, version) for name, entry in payload["adapters"].items()}
        options, layers = (payload.get(field) for field in ("options", "layers"))
        run = cls(
            form=payload["form"],
            adapters=adapters,
            trained=payload["trained"],
            base=dict(payload["base"]),
            idle=payload["idle"],
            options=dict(options) if isinstance(options, Mapping) else {},
            layers={n: v for n, v in layers.items() if isinstance(v, str)} if isinstance(layers, Mapping) else {},
            average=_average(payload["average"], adapters) if "average" in payload else None,
            version=version,
        )
        run._check_base()
        return run

    def _check_base(self) -> None:
        plain = {plain_name(key) for key in self.base}
        for name, state in self.adapters.items():
            frozen = {name, f"{name}.weight"} & plain
            if frozen and state.resample is not None:
                raise _malformed(f"{name!r} is drawn anew and its weight in `base`")
            if not frozen and self.form != "merged":
                raise _malformed(f"`base` has no weight for {name!r}")
        known = {*self.adapters, *self.idle}
        for key, expected in self.base.items():
            dtype = dtype_of(expected) if isinstance(expected, str) else None
            if dtype is None or (is_quantized(expected) and dtype not in NUMBERS):
                shown = repr(expected) if isinstance(expected, str) else "no text"
                raise _malformed(f"the fingerprint of {key!r} is {shown}")
            adapted = {plain_name(key), plain_name(key).removesuffix(".weight")} & known
            if self.form != "adapter" and not adapted and not is_quantized(expected):
                raise _malformed(f"{key!r} in `base` has no adapter")

    def to_mapping(self) -> State:
        """Return what is written to a file."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("adapters", "average"):
            if fields[name] is not None:
                fields[name] = {key: _to_mapping(state) for key, state in fields[name].items()}
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def of_weights(self) -> SavedRun:
        """The run with the adapters that belong to the file's ``state_dict``: those of the average, if it has one."""
        return self if self.average is None else dataclasses.replace(self, adapters=self.average, average=None)

    def by_key(self, keys: Mapping[str, Any]) -> dict[str, AdapterState]:
        """Return the adapters by the key that their weight has in ``keys``."""
        return {weight_key(name, keys): state for name, state in self.adapters.items()}

    def check_weights(self, state: Any, current: Mapping[str, Any], stored: Mapping[str, Storage]) -> None:
        """Check that weights have the shapes of the increments that are folded into them.

        Args:
            state: The file's ``state_dict``.
            current: The weights of the module.
            stored: Its quantised weights, whose tensors have other shapes.

        Raises:
            LoRAError: If they have not.
        """
        if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
            raise LoRAError("The checkpoint's `state_dict` is missing or no Mapping of names.")
        for weights in (state, current):
            keys = {name: weight_key(name, weights) for name in self.adapters}
            for name, key in keys.items():
                weight, shape = weights.get(key), self.adapters[name].shape
                if weight is not None and key not in stored and not (is_number(weight) and list(weight.shape) == shape):
                    raise LoRAError(f"The adapter of {name!r} in the checkpoint is not one for the weight {key!r}.")
            if len(set(keys.values())) < len(keys):
                raise _malformed("a weight has two adapters")


def _malformed(what: str) -> LoRAError:
    return LoRAError(f"The checkpoint's `{KEY}` entry is malformed: {what}.")


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def is_number(tensor: Any) -> bool:
    """Return whether ``tensor`` can be computed with: it is dense, plain, real, and has data."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.dtype in NUMBERS
        and not (tensor.is_meta or tensor.is_nested)
    )


# ------------------------------------------------------------------------------------------------------------ adapters


def _to_mapping(state: AdapterState) -> State:
    fields = {name: getattr(state, name) for name in ADAPTER_FIELDS}
    if state.padding_idx is None:
        del fields["padding_idx"]
    return {**fields, **state.tensors}


def _adapter(name: str, entry: Any, version: int = VERSION) -> AdapterState:
    """Return what ``entry``, of a file of the format ``version``, says of the adapter ``name``."""
    decomposition = entry.get("decomposition") if isinstance(entry, Mapping) else None
    if isinstance(decomposition, str):
        check_choice(f"{KEY}.adapters[{name!r}].decomposition", decomposition, tuple(DECOMPOSITIONS))
    state = _typed(entry) if isinstance(entry, Mapping) else None
    if state is None or not _fits_together(state):
        raise _malformed(f"A, B, shape, scale, transposed of {name!r} do not fit")
    if version <= 2 and state.resample == "A" and "A" not in state.tensors:
        _, _, n = state.sides()
        shape = (*state.B.shape[:-1], n)
        drawn = draws.normal_of_format_2(state.key, state.drawn_at, shape, state.rank**-0.5)
        state.tensors["A"] = drawn.to(state.B.dtype)
    return state


def _typed(entry: Mapping[Any, Any]) -> AdapterState | None:
    """Return the state that ``entry`` is; None if a field is missing, of another type, or out of bounds."""
    tensors = {field: value for field, value in entry.items() if isinstance(value, Tensor)}
    fields = {"padding_idx": None, **{field: value for field, value in entry.items() if field not in tensors}}
    if fields.keys() != ADAPTER_FIELDS.keys() or "B" not in tensors:
        return None
    if not all(type(fields[field]) in kinds for field, kinds in ADAPTER_FIELDS.items()):
        return None
    if not all(isinstance(name, str) and is_number(tensor) for name, tensor in tensors.items()):
        return None
    state = AdapterState(tensors=tensors, **fields)
    within = (
        all(_is_int(value) for value in (*state.shape, state.steps, state.drawn_at, state.padding_idx or 0))
        and all(side > 0 for side in state.shape)
        and (state.resample is None or state.resample in RESAMPLES)
        and 0 <= state.drawn_at <= state.steps
        and abs(state.scale) <= torch.finfo(torch.float32).max  # which "not a number" is not
    )
    return state if within else None


def _fits_together(state: AdapterState) -> bool:
    """Return whether the tensors have the shapes that the weight's asks for, and one dtype."""
    kind, B, tensors = DECOMPOSITIONS[state.decomposition], state.B, state.tensors
    if B.dim() not in (2, 3) or B.dim() > len(state.shape):
        return False
    of_stack, m, n = state.sides()
    sides = {"B": m, **({"A": n} if state.resample != "A" else {})}
    if "A0" in tensors or "B0" in tensors:
        sides |= {"A0": n, "B0": m}
    shapes = {name: [*of_stack, state.rank, side] for name, side in sides.items()}
    shapes |= {name: [*of_stack, m] for name in kind.per_output}
    if not 0 <= (state.padding_idx or 0) < n or not 0 < state.rank <= min(m, n) or not shapes.keys() <= tensors.keys():
        return False
    if any(list(tensors[name].shape) != expected for name, expected in shapes.items()):
        return False
    if any(tensors[name].dtype != B.dtype for name in sides):
        return False
    try:
        kind.check_shape("", m, n, state.rank, "zero")
        return "A" not in sides or Adapter.from_state(state) is not None
    except (ValueError, KeyError):  # no such rank; names that no parameter can have
        return False


def _average(average: Any, adapters: Mapping[str, AdapterState]) -> dict[str, AdapterState]:
    """Return what ``average`` says, which has an adapter like each of ``adapters``."""
    if isinstance(average, Mapping) and average.keys() == adapters.keys():
        states = {name: _adapter(f"{name} of the average", average[name]) for name in adapters}
        if all(_kind(states[name]) == _kind(state) for name, state in adapters.items()):
            return states
    raise _malformed("`average` holds no adapters like those in `adapters`")


def _kind(state: AdapterState) -> AdapterState:
    """Return ``state`` without the values of its tensors."""
    tensors: Any = {name: (tensor.shape, tensor.dtype) for name, tensor in state.tensors.items()}
    return dataclasses.replace(state, tensors=tensors)


# --------------------------------------------------------------------------------------------------- keys, fingerprints


def weight_key(name: str, state: Mapping[str, Any]) -> str:
    """Return the key in ``state`` of the weight whose adapter is called ``name``."""
    names = (name, f"{name}.weight")
    found = (key for key in names if key in state)
    compiled = (key for key in state if plain_name(key) != key and plain_name(key) in names)
    return next(itertools.chain(found, compiled), names[1])


def dtype_of(expected: str) -> torch.dtype | None:
    """Return the dtype that the fingerprint ``expected`` begins with, or None."""
    dtype = vars(torch).get(expected.partition(":")[0])
    return dtype if isinstance(dtype, torch.dtype) else None


def cast_as(weight: Any, expected: str) -> Tensor | None:
    """Return ``weight`` in the dtype of the fingerprint ``expected``, as a precision may cast it; None if it cannot."""
    dtype = dtype_of(expected)
    if not isinstance(weight, Tensor) or not (dtype == weight.dtype or (dtype in NUMBERS and weight.dtype in NUMBERS)):
        return None
    return weight.to(dtype)
