"""Linears whose weight is stored quantised, by bitsandbytes or torchao: what is stored, and the weight it stands for.

Neither library is imported here: where it has not been, no module can be one of its own.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_lora.naming import state_key
from lightning_lora.weights.digest import digest


class Storage:
    """How one layer stores its weight W0.

    Args:
        layer: A Linear with a quantised weight, or one that is quantised when it is moved to its device.
        dtype: That of the plain weight; by default what the library notes.
    """

    name: str
    own: tuple[str, ...] = ()
    """Attributes of the layer that a plain Linear does not have."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype | None = None) -> None:
        self.layer = layer
        self.dtype = dtype or self.noted_dtype()

    @property
    def weight(self) -> Any:
        """What stands in the place of the weight."""
        return self.layer._parameters["weight"]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the plain weight."""
        return self.layer.out_features, self.layer.in_features

    @property
    def packed(self) -> bool:
        """Whether the weight has been quantised already."""
        raise NotImplementedError

    def noted_dtype(self) -> torch.dtype:
        """The dtype of the weight that was quantised, as far as the library notes it."""
        return torch.float32

    def trouble(self) -> str | None:
        """Why the layer cannot be trained through, where it cannot."""
        return None

    def tensors(self) -> list[Tensor]:
        """All that is stored of the weight; what it takes in memory, and what its fingerprint is of."""
        raise NotImplementedError

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        """W0 (m, n) in float32, a tensor of its own."""
        if not self.packed:
            return self.weight.detach().to(torch.float32, copy=True)
        return self._dequantized()

    def _dequantized(self) -> Tensor:
        raise NotImplementedError

    def fingerprint(self) -> str:
        """The dtype and shape of the plain weight, how it is stored, and the SHA-256 of all that is stored."""
        return f"{str(self.dtype).removeprefix('torch.')}:{'x'.join(map(str, self.shape))}:{self._stored()}"

    def has(self, expected: str) -> bool:
        """Whether ``expected``, a fingerprint, is of what is stored here; in which dtype it is stated is no matter."""
        return expected.split(":", 1)[-1] == self.fingerprint().split(":", 1)[-1]

    def _stored(self) -> str:
        digests = "".join(digest(tensor) for tensor in self.tensors())
        return f"{self.name}:{hashlib.sha256(digests.encode()).hexdigest()}"

    @torch.no_grad()
    def make_plain(self, weight: Tensor) -> None:
        """Makes the layer a plain :class:`torch.nn.Linear` with ``weight`` for good: it cannot be stored as exactly."""
        layer = self.layer
        layer.__class__ = nn.Linear
        layer.weight = nn.Parameter(weight.to(self.dtype), requires_grad=False)
        if layer.bias is not None:  # which bitsandbytes casts to the dtype it computes in
            layer.bias.data = layer.bias.data.to(self.dtype)
        for name in self.own:
            layer.__dict__.pop(name, None)
        layer._load_state_dict_pre_hooks.clear()  # those of the library, which quantise, or look for what it stores
        layer._load_state_dict_post_hooks.clear()


class Int8(Storage):
    """bitsandbytes' ``Linear8bitLt``: whole numbers, and the largest entry of each row."""

    name = "int8"
    own = ("state", "index")

    @property
    def packed(self) -> bool:
        return self.weight.dtype == torch.int8

    def _scales(self) -> Tensor:
        scales = getattr(self.weight, "SCB", None)  # which the first forward moves
        return cast(Any, self.layer).state.SCB if scales is None else scales

    def tensors(self) -> list[Tensor]:
        return [self.weight.data, self._scales()] if self.packed else [self.weight.data]

    def _dequantized(self) -> Tensor:
        return self.weight.data.float() * (self._scales().float() * (1 / 127))[:, None]  # as in its kernels


class FourBit(Storage):
    """bitsandbytes' ``Linear4bit``: places in a table, and the largest entry of each block, itself quantised or not."""

    own = ("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu")

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.weight.quant_type

    @property
    def state(self) -> Any:
        state = getattr(self.weight, "quant_state", None)
        return getattr(self.layer, "quant_state", None) if state is None else state

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


class TorchAO(Storage):
    """A Linear whose weight is one of torchao's tensors."""

    own = ("extra_repr",)
    packed = True

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
        """Some are cast with the module around them, which Lightning does after it loads a file."""
        if super().has(expected):
            return True
        if not is_quantized(expected):
            return False
        cast_to = copy.copy(self.layer)
        cast_to._parameters = {"weight": nn.Parameter(self.weight.data.to(_dtype_of(expected)), requires_grad=False)}
        return Storage.has(TorchAO(cast_to), expected)


def form(tensor: Any) -> tuple[Any, ...]:
    """Return what two tensors share of which one can be copied into the other."""
    return hasattr(tensor, "__tensor_flatten__"), tensor.dtype, tensor.shape


def _inner(tensor: Any) -> list[Tensor]:
    """The plain tensors that a tensor of a subclass is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return [inner for part in parts if part is not None for inner in _inner(part)]


def _dtype_of(expected: str) -> torch.dtype:
    return getattr(torch, expected.partition(":")[0])


def is_quantized(expected: str) -> bool:
    """Whether ``expected`` is the fingerprint of what a quantised layer stores."""
    return expected.count(":") == 3


def storage_of(module: nn.Module, dtype: torch.dtype | None = None) -> Storage | None:
    """How ``module`` stores its weight; None for every layer with a weight of floating point."""
    bnb: Any = sys.modules.get("bitsandbytes.nn")
    if bnb is not None and hasattr(bnb, "Linear4bit"):
        if isinstance(module, bnb.Linear4bit):
            return FourBit(module, dtype)
        if isinstance(module, bnb.Linear8bitLt) and not cast(Any, module).state.has_fp16_weights:
            return Int8(module, dtype)
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear) and weight is not None and type(weight.data).__module__.startswith("torchao."):
        return TorchAO(module, dtype)
    return None


def storages(root: nn.Module) -> dict[str, Storage]:
    """Key in the state of ``root`` -> how it is stored, for every quantised weight, under each of its names.

    The plain weight has the dtype of the rest of the model: what the library notes is older than a cast of the model.
    """
    found = [
        (f"{state_key(path)}.weight".lstrip("."), module)
        for path, module in root.named_modules(remove_duplicate=False)
        if storage_of(module) is not None
    ]
    dtype = _dtype_of_the_rest(root, {module for _, module in found}) if found else None
    return {key: cast(Storage, storage_of(module, dtype)) for key, module in found}


def _dtype_of_the_rest(root: nn.Module, quantized: set[nn.Module]) -> torch.dtype | None:
    """That of the first parameter of floating point in ``root`` which is in no quantised layer and no adapter."""
    left_out = quantized | {child for module in root.modules() for child in _adapter(module)}
    for module in root.modules():
        if module not in left_out:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.is_floating_point():
                    return parameter.dtype
    return None


def _adapter(module: nn.Module) -> Iterator[nn.Module]:
    lora = module._modules.get("lora")
    if hasattr(module, "holds_increment") and lora is not None:
        yield from lora.modules()


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


def quantize(root: nn.Module, device: torch.device) -> None:
    """Moves to ``device`` the layers that bitsandbytes quantises when they are moved there for the first time."""
    for stored in {id(stored.layer): stored for stored in storages(root).values()}.values():
        if not stored.packed and not stored.weight.is_meta:
            stored.layer.to(device)


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
