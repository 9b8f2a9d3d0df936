"""Linears whose weight is stored quantised, by bitsandbytes or torchao: what is stored, and the weight it stands for.

Neither library is imported here: where it has not been, no module can be one of its own.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_lora.weights.digest import digest, seen
from lightning_lora.weights.storage import Storage


class Quantized(Storage):
    """The weight W0 of a Linear, quantised, or to be so when it is moved to its device."""

    read_only = True
    own: ClassVar[tuple[str, ...]] = ()
    """Attributes of the layer that a plain Linear does not have."""

    @property
    def dtype(self) -> torch.dtype:
        """That of the rest of the model: what the library notes is older than a cast of the model."""
        found = None if self.root is None else _dtype_of_the_rest(self.root)
        return self.noted_dtype() if found is None else found

    @property
    def shape(self) -> tuple[int, ...]:
        layer = cast(nn.Linear, self.module)
        return layer.out_features, layer.in_features

    @property
    def packed(self) -> bool:
        """Whether the weight has been quantised already."""
        raise NotImplementedError

    def noted_dtype(self) -> torch.dtype:
        """Return the dtype of the weight that was quantised, as far as the library notes it."""
        return torch.float32

    @torch.no_grad()
    def full(self) -> Tensor:
        """W0 (m, n) in float32, a tensor of its own."""
        if not self.packed:
            return self.weight.detach().to(torch.float32, copy=True)
        return self._dequantized()

    def _dequantized(self) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def assign(self, value: Tensor) -> None:
        """Make the layer a plain :class:`torch.nn.Linear` for good: no value can be stored as exactly."""
        layer, dtype = cast(nn.Linear, self.module), self.dtype
        layer.__class__ = nn.Linear
        layer.weight = nn.Parameter(value.to(dtype), requires_grad=False)
        if layer.bias is not None:  # which bitsandbytes casts to the dtype it computes in
            layer.bias.data = layer.bias.data.to(dtype)
        for name in self.own:
            layer.__dict__.pop(name, None)
        layer._load_state_dict_pre_hooks.clear()  # those of the library, which quantise, or look for what it stores
        layer._load_state_dict_post_hooks.clear()

    def misfit(self, value: Tensor) -> str | None:
        if not self.packed or _form(value) == _form(self.weight):
            return None
        return (  # it would be copied entry by entry, and cut off to whole numbers
            f"is {value.dtype} in the shape {tuple(value.shape)}, and the module stores it quantised ({self.name})."
            " Load it into the plain module, and quantise that."
        )

    def seen(self) -> tuple[Any, ...]:
        return seen(self.tensors()[0])

    def fingerprint(self) -> str:
        """Return dtype and shape of the plain weight, how it is stored, and the SHA-256 of all that is stored."""
        return f"{str(self.dtype).removeprefix('torch.')}:{'x'.join(map(str, self.shape))}:{self._stored()}"

    def has(self, expected: str) -> bool:
        """Return whether ``expected`` is the fingerprint of what is stored here, stated in whatever dtype."""
        return expected.split(":", 1)[-1] == self.fingerprint().split(":", 1)[-1]

    def _stored(self) -> str:
        digests = "".join(digest(tensor) for tensor in self.tensors())
        return f"{self.name}:{hashlib.sha256(digests.encode()).hexdigest()}"


class Int8(Quantized):
    """bitsandbytes' ``Linear8bitLt``: whole numbers, and the largest entry of each row."""

    name = "int8"
    own = ("state", "index")

    @classmethod
    def stores(cls, module: nn.Module, parameter: str) -> bool:
        return _is_bitsandbytes(module, parameter, "Linear8bitLt") and not cast(Any, module).state.has_fp16_weights

    @property
    def packed(self) -> bool:
        return self.weight.dtype == torch.int8

    def _scales(self) -> Tensor:
        scales = getattr(self.weight, "SCB", None)  # which the first forward moves
        return cast(Any, self.module).state.SCB if scales is None else scales

    def tensors(self) -> list[Tensor]:
        return [self.weight.data, self._scales()] if self.packed else [self.weight.data]

    def _dequantized(self) -> Tensor:
        return self.weight.data.float() * (self._scales().float() * (1 / 127))[:, None]  # as in its kernels


class FourBit(Quantized):
    """bitsandbytes' ``Linear4bit``: places in a table, and the largest entry of each block, itself quantised or not."""

    own = ("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu")

    @classmethod
    def stores(cls, module: nn.Module, parameter: str) -> bool:
        return _is_bitsandbytes(module, parameter, "Linear4bit")

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.weight.quant_type

    @property
    def state(self) -> Any:
        state = getattr(self.weight, "quant_state", None)
        return getattr(self.module, "quant_state", None) if state is None else state

    @property
    def packed(self) -> bool:
        return self.state is not None

    def noted_dtype(self) -> torch.dtype:
        return self.state.dtype if self.packed else self.weight.dtype

    def trouble(self) -> str | None:
        if self.packed and getattr(self.state, "packing_format_for_cpu", False):
            return (
                "was rewritten by bitsandbytes in an evaluation on this CPU: its scales are rounded, and no gradient"
                " passes through it. Build the module again, and evaluate it in `fit` or after"
            )
        return None

    def tensors(self) -> list[Tensor]:
        if not self.packed:
            return [self.weight.data]
        state, found = self.state, [self.weight.data]
        found += [state.absmax, state.code]
        if state.nested:
            found += [state.offset, state.state2.absmax, state.state2.code]
        return found

    def _dequantized(self) -> Tensor:
        state = copy.copy(self.state)
        state.dtype = torch.float32
        return sys.modules["bitsandbytes"].functional.dequantize_4bit(self.weight.data.view(-1, 1), state)


class TorchAO(Quantized):
    """A Linear whose weight is one of torchao's tensors."""

    own = ("extra_repr",)
    packed = True

    @classmethod
    def stores(cls, module: nn.Module, parameter: str) -> bool:
        weight = module._parameters.get(parameter) if isinstance(module, nn.Linear) else None
        return weight is not None and type(weight.data).__module__.startswith("torchao.")

    @property
    def name(self) -> str:  # type: ignore[override]
        return type(self.weight.data).__name__

    def noted_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def trouble(self) -> str | None:
        marks = ("act_quant_kwargs", "input_quant_func")  # of torchao's tensors, the second up to its version 0.14
        if any(getattr(self.weight.data, mark, None) is not None for mark in marks):
            return (
                f"is a {self.name} that quantises the activations too, through which no gradient passes. Use a"
                " configuration of torchao that quantises the weight only, such as `Int8WeightOnlyConfig`"
            )
        return None

    def tensors(self) -> list[Tensor]:
        return _inner(self.weight.data)

    def _dequantized(self) -> Tensor:
        return self.weight.data.dequantize().to(torch.float32, copy=True)

    def has(self, expected: str) -> bool:
        """Leave out the dtypes: Lightning casts some with the module around them, after it loads a file."""
        if super().has(expected):
            return True
        if not is_quantized(expected):
            return False
        cast_to = copy.copy(self.module)
        cast_to._parameters = {"weight": nn.Parameter(self.weight.data.to(_dtype_of(expected)), requires_grad=False)}
        return Quantized.has(TorchAO(cast_to), expected)


def _is_bitsandbytes(module: nn.Module, parameter: str, kind: str) -> bool:
    found = getattr(sys.modules.get("bitsandbytes.nn"), kind, None)
    return found is not None and isinstance(module, found) and parameter == "weight"


def _form(tensor: Any) -> tuple[Any, ...]:
    """Return what two tensors share of which one can be copied into the other."""
    return hasattr(tensor, "__tensor_flatten__"), tensor.dtype, tensor.shape


def _inner(tensor: Any) -> list[Tensor]:
    """Return the plain tensors that a tensor of a subclass is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return [inner for part in parts if part is not None for inner in _inner(part)]


def _dtype_of(expected: str) -> torch.dtype:
    return getattr(torch, expected.partition(":")[0])


def is_quantized(expected: str) -> bool:
    """Return whether ``expected`` is the fingerprint of what a quantised layer stores."""
    return expected.count(":") == 3


def _dtype_of_the_rest(root: nn.Module) -> torch.dtype | None:
    """Return the dtype of the first floating-point parameter in ``root`` of no quantised layer and no adapter."""
    if not any(kind.stores(root, "weight") for kind in (FourBit, Int8, TorchAO)):
        for parameter in root._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                return parameter.dtype
    children = (child for name, child in root.named_children() if not (name == "lora" and hasattr(root, "adapted")))
    return next((dtype for child in children if (dtype := _dtype_of_the_rest(child)) is not None), None)


REWRITES = "support_avx512bf16_for_cpu"
"""An attribute of bitsandbytes' 4-bit layers. Where it is true, they rewrite their weight in an evaluation on the CPU,
with scales rounded to bfloat16, and let no gradient pass from then on."""


def without_extras(state: dict[str, Any], stored: Mapping[str, Storage]) -> None:
    """Leaves one entry in ``state`` for each quantised weight, and its bias as it was before bitsandbytes cast it."""
    for key in stored:
        layer = key.removesuffix("weight")
        extras = [name for name in state if name.startswith(f"{key}.")]
        for name in (*extras, f"{layer}SCB", f"{layer}weight_format"):
            state.pop(name, None)
        bias, dtype = state.get(f"{layer}bias"), stored[key].dtype
        if bias is not None and torch.promote_types(bias.dtype, dtype) == dtype:
            state[f"{layer}bias"] = bias.to(dtype)


def quantize(stored: Iterable[Storage], device: torch.device) -> None:
    """Move to ``device`` the layers that bitsandbytes quantises when they are moved there for the first time."""
    for weight in stored:
        if isinstance(weight, Quantized) and not weight.packed and not weight.weight.is_meta:
            weight.module.to(device)


@contextlib.contextmanager
def torch_linear() -> Iterator[None]:
    """Has torch's own under that name, where Lightning's plugin puts that of bitsandbytes for ``configure_model``."""
    replaced = nn.Linear
    nn.Linear = torch.nn.modules.linear.Linear  # type: ignore[misc]
    try:
        yield
    finally:
        nn.Linear = replaced  # type: ignore[misc]


def numel(parameter: Any) -> int:
    """Return the number of entries of the weight that ``parameter`` stores; 0 where it has no shape yet."""
    if isinstance(parameter, UninitializedParameter):
        return 0
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)
