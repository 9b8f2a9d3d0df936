"""What reading an adapted weight gives in factored mode: W = W0 + increment, not formed until something asks for it.

A lazy weight has the shape, dtype and device of W0 and no storage. It is made by an autograd Function, so whatever
consumes it sends its gradient G to A and B, where it is projected and freed. What is known to be linear in it (a linear
layer, a convolution, a lookup, a matrix product) takes the thin path of :mod:`~lightning_lora.gradients.factored`:
there the operation is known exactly, whatever the class of the module is. Transposing and selecting stay lazy. Anything
else forms W once; autograd keeps the lazy weight in its place and forms W again in the backward.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora import _compat
from lightning_lora.adapters import Adapter
from lightning_lora.errors import LoRAError
from lightning_lora.gradients import factored
from lightning_lora.gradients.autocast import without_autocast
from lightning_lora.gradients.paths import ConvolutionPath, LookupPath
from lightning_lora.gradients.presents import presents
from lightning_lora.gradients.transforms import is_transformed


@dataclasses.dataclass(frozen=True)
class Increment:
    """W0 and what makes W of it: ``gain * (W0 + scale * B.T @ A)`` as a matrix (m, n) or a stack of such."""

    weight: Tensor
    """W0 as it is stored, without a gradient."""
    A: Tensor
    """(r, n) or (k, r, n), in autograd's graph."""
    B: Tensor
    """(r, m) or (k, r, m)."""
    gain: Tensor | None
    """(m,) or (k, m)."""
    scale: float
    transposed: bool
    """Whether ``weight`` is stored (n, m)."""
    dropout: float
    """Probability that an entry of a thin path's input is zeroed."""

    def as_matrix(self, tensor: Tensor) -> Tensor:
        """Return ``tensor``, of the weight's shape, as (m, n) or (k, m, n)."""
        matrix = tensor.flatten(self.A.dim() - 1)
        return matrix.mT if self.transposed else matrix

    def form(self) -> Tensor:
        """Return W in the dtype of W0, rounded once from at least float32; differentiable."""
        dtype = torch.promote_types(torch.promote_types(self.A.dtype, self.weight.dtype), torch.float32)
        A, B = self.A.to(dtype), self.B.to(dtype)
        with torch.autocast(self.weight.device.type, enabled=False):
            delta = (A.mT @ B if self.transposed else B.mT @ A).view(self.weight.shape)
            W = torch.add(self.weight.to(dtype), delta, alpha=self.scale)
            if self.gain is not None:
                W = W * self._by_rows(self.gain)
        return W.to(self.weight.dtype)

    def _by_rows(self, gain: Tensor) -> Tensor:
        if self.transposed:
            return gain.unsqueeze(-2)
        return gain.view(*gain.shape, *(1 for _ in self.weight.shape[gain.dim() :]))

    def project(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return dA = s B G, dB = s A G^T (article, eq. grad-1) and the gradient of the gain, all thin."""
        G, dgain = self.as_matrix(gradient), None
        A, B = self.A.to(G.dtype), self.B.to(G.dtype)
        AG = A @ G.mT
        if self.gain is not None:  # W = gain V
            dgain = (G * self.as_matrix(self.weight).to(G.dtype)).sum(-1) + self.scale * (B * AG).sum(-2)
            G = G * self.gain.to(G.dtype)[..., None]
            AG = A @ G.mT
        return self.scale * (B @ G), self.scale * AG, dgain

    def transpose(self) -> Increment:
        """Return the increment of the transposed matrix."""
        return dataclasses.replace(self, weight=self.weight.mT, transposed=not self.transposed)

    def select(self, index: Any) -> Increment:
        """Return the increment of one matrix of a stack."""
        gain = None if self.gain is None else self.gain[index]
        return dataclasses.replace(self, weight=self.weight[index], A=self.A[index], B=self.B[index], gain=gain)


@presents(lambda weight, *_: weight)
def read(weight: Tensor, adapter: Adapter, training: bool) -> Tensor:
    """Return W for the frozen parameter ``weight``, W0; lazy where Python calls torch, formed in a transform or trace.

    Args:
        weight: W0, frozen.
        adapter: Its adapter.
        training: Whether dropout applies on thin paths.
    """
    A, B = adapter.increment()
    dropout = adapter.dropout if training else 0.0
    increment = Increment(weight.detach(), A, B, adapter.gain(weight), adapter.scale, adapter.transposed, dropout)
    if is_transformed() or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return increment.form()
    return lazy(increment)


def lazy(increment: Increment) -> LazyWeight:
    """Return the lazy weight of ``increment``, in autograd's graph."""
    if torch.is_grad_enabled():
        return _Handle.apply(increment.A, increment.B, increment.gain, increment)
    return LazyWeight(increment)


class LazyWeight(Tensor):
    """W as a handle on W0, A and B. See the module's docstring."""

    increment: Increment

    @staticmethod
    def __new__(cls, increment: Increment) -> LazyWeight:
        W0 = increment.weight
        made = Tensor._make_wrapper_subclass(cls, W0.shape, strides=W0.stride(), dtype=W0.dtype, device=W0.device)
        made.increment = increment
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what ``func`` asks for in the cheapest way that is known to be right."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in METADATA or (name == "__get__" and getattr(func.__self__, "__name__", "") in METADATA_NAMES):
            return super().__torch_function__(func, types, args, kwargs)
        if (known := KNOWN.get(func)) is not None:
            result = known(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if name == "__get__" and (attribute := getattr(func.__self__, "__name__", "")) in ATTRIBUTES:
            return ATTRIBUTES[attribute](args[0])
        if _writes(func, name, args, kwargs):
            raise LoRAError(
                "A weight with an adapter was written to through what reading it gave, and the write would be lost:"
                " it is W = W0 + increment, computed when it is read. Write to it inside"
                " `with lightning_lora.merged(module):`, or before the adapters are put in."
            )
        formed: dict[int, Tensor] = {}
        args, kwargs = _with_formed((args, kwargs), formed)
        with _keeping_lazy(list(formed.values())):
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Form W for callers below Python, but for those that only pass the handle on."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return LazyWeight(args[0].increment)
        args, kwargs = torch.utils._pytree.tree_map_only(
            LazyWeight, lambda lazy: lazy.increment.form().detach(), (args, kwargs or {})
        )
        return func(*args, **kwargs)


class _Handle(torch.autograd.Function):
    """Makes the lazy weight, and projects the gradient that arrives for it."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, gain: Tensor | None, increment: Increment) -> LazyWeight:
        ctx.save_for_backward(A, B, gain)
        ctx.increment = dataclasses.replace(increment, A=A.detach(), B=B.detach())
        return LazyWeight(increment)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        A, B, gain = ctx.saved_tensors
        return *dataclasses.replace(ctx.increment, A=A, B=B, gain=gain).project(gradient), None


class _Form(torch.autograd.Function):
    """Forms W of a lazy weight, to which its gradient goes."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyWeight) -> Tensor:
        return lazy.increment.form()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _with_formed(value: Any, formed: dict[int, Tensor]) -> Any:
    """Return ``value`` with W in the place of each lazy weight, each formed once."""
    if isinstance(value, LazyWeight):
        if id(value) not in formed:
            W = _Form.apply(value)
            W.lazy = value
            formed[id(value)] = W
        return formed[id(value)]
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(_with_formed(item, formed) for item in value)
    if isinstance(value, dict):
        return {key: _with_formed(item, formed) for key, item in value.items()}
    return value


def _keeping_lazy(formed: list[Any]) -> AbstractContextManager[Any]:
    """Have autograd keep lazy weights in the place of ``formed`` ones and of views of them.

    Where hooks of the user's own stand, as those of an activation checkpoint, they see to what is kept.
    """
    if not torch.is_grad_enabled() or _compat.top_pack_hook() is not None:
        return nullcontext()
    increments = {W.untyped_storage().data_ptr(): W.lazy.increment for W in formed}

    def pack(tensor: Tensor) -> Any:
        plain = type(tensor) is Tensor
        increment = increments.get(tensor.untyped_storage().data_ptr()) if plain and tensor.numel() else None
        if increment is None:
            return tensor
        return increment, tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        increment, shape, stride, offset = kept
        with torch.no_grad():
            return increment.form().as_strided(shape, stride, offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


# ---------------------------------------------------------------------------------------------- what is known exactly


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, LazyWeight) or isinstance(x, LazyWeight) or weight.dim() != 2:
        return NotImplemented
    increment, plain_bias = weight.increment, bias
    A, B, gain = increment.A, increment.B, increment.gain
    if increment.transposed:  # the matrix of this product is the transposed one
        if gain is not None:
            return NotImplemented
        A, B = B, A
    if gain is not None:
        plain_bias = None
    y = factored.linear(x, increment.weight, plain_bias, A, B, increment.scale, increment.dropout)
    return factored.rescaled(y, gain, None) + (0 if bias is None else bias) if gain is not None else y


def _matmul(x: Any, weight: Any, **kwargs: Any) -> Any:
    if kwargs or not isinstance(weight, LazyWeight) or weight.dim() != 2 or weight.increment.gain is not None:
        return NotImplemented
    return _linear(x, _transpose(weight))


def _along(path: Any, base: Callable[[Tensor], Tensor], x: Tensor, weight: LazyWeight) -> Tensor:
    increment = weight.increment
    y = base(increment.weight)
    x = F.dropout(x, increment.dropout) if increment.dropout and x.is_floating_point() else x
    return path.add(y, x, increment.A.to(y.dtype), increment.B.to(y.dtype), increment.scale)


def _embedding(x: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *args: Any, **kwargs: Any) -> Any:
    plain = isinstance(weight, LazyWeight) and max_norm is None and not any(args) and not any(kwargs.values())
    if not plain or isinstance(x, LazyWeight) or not weight.increment.transposed or weight.increment.gain is not None:
        return NotImplemented
    return _along(LookupPath(padding_idx), lambda W0: F.embedding(x, W0, padding_idx), x, weight)


def _convolution(convolve: Any, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(weight, LazyWeight) or isinstance(x, LazyWeight) or weight.increment.gain is not None:
        return NotImplemented
    groups = kwargs.get("groups", args[3] if len(args) > 3 else 1)
    path = ConvolutionPath(lambda x, filters: convolve(x, filters, None, *args, **kwargs), weight.shape, groups)
    return _along(path, lambda W0: convolve(x, W0, bias, *args, **kwargs), x, weight)


def _transpose(weight: Any, *dims: Any) -> Any:
    sides = {dim % 2 for dim in dims} if dims else {0, 1}
    if weight.dim() != 2 or weight.increment.weight.dim() != 2 or sides != {0, 1}:
        return NotImplemented
    return lazy(weight.increment.transpose())


def _select(weight: Any, index: Any) -> Any:
    if not isinstance(weight, LazyWeight) or weight.increment.A.dim() != 3:
        return NotImplemented
    if isinstance(index, Tensor):
        is_one = index.dim() == 0 and not index.is_floating_point() and index.dtype != torch.bool
    else:
        is_one = isinstance(index, int) and not isinstance(index, bool)
    return lazy(weight.increment.select(index)) if is_one else NotImplemented


def _unbind(weight: Any, dim: int = 0) -> Any:
    if weight.increment.A.dim() != 3 or dim != 0:
        return NotImplemented
    return tuple(_select(weight, index) for index in range(weight.shape[0]))


def _iterate(weight: Any) -> Iterator[Any]:
    found = _unbind(weight)
    return NotImplemented if found is NotImplemented else iter(found)


def _detached(weight: LazyWeight) -> LazyWeight:
    increment = weight.increment
    gain = None if increment.gain is None else increment.gain.detach()
    return LazyWeight(dataclasses.replace(increment, A=increment.A.detach(), B=increment.B.detach(), gain=gain))


KNOWN: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    **{c: functools.partial(_convolution, c) for c in (F.conv1d, F.conv2d, F.conv3d)},
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.t, Tensor.t, torch.transpose, Tensor.transpose), _transpose),
    Tensor.__getitem__: _select,
    Tensor.unbind: _unbind,
    torch.unbind: _unbind,
    Tensor.__iter__: _iterate,
    Tensor.detach: _detached,
}
"""torch function -> what does the same to a lazy weight without forming it, or returns ``NotImplemented``."""

ATTRIBUTES: dict[str, Callable[[LazyWeight], Any]] = {
    "T": lambda weight: _or_formed(_transpose(weight), weight, "T"),
    "mT": lambda weight: _or_formed(_transpose(weight), weight, "mT"),
    "data": _detached,
}

# fmt: off
METADATA_NAMES = frozenset((
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf", "grad", "itemsize", "nbytes",
    "is_cuda", "is_cpu", "is_xpu", "is_mps", "is_xla", "is_hpu", "is_meta", "is_nested", "is_sparse", "is_sparse_csr",
    "is_quantized", "is_mkldnn", "names", "_version", "output_nr", "retains_grad", "_backward_hooks", "_base",
))
"""Attributes that the handle answers by itself."""
METADATA = frozenset(getattr(Tensor, name, None) for name in (
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "is_floating_point",
    "is_complex", "is_signed", "is_inference", "element_size", "get_device", "has_names", "__len__", "__hash__",
    "__repr__", "register_hook", "retain_grad", "requires_grad_",
)) | {torch.is_floating_point, torch.is_complex, torch.numel}
"""Methods and functions that it answers by itself."""
# fmt: on


def _or_formed(found: Any, weight: LazyWeight, name: str) -> Any:
    if found is not NotImplemented:
        return found
    formed: dict[int, Tensor] = {}
    return getattr(_with_formed(weight, formed), name)


def _writes(func: Any, name: str, args: Any, kwargs: Any) -> bool:
    """Return whether ``func`` writes into a lazy weight."""
    if isinstance(kwargs.get("out"), LazyWeight):
        return True
    into = args[0] if args else kwargs.get("self", kwargs.get("tensor"))
    if not isinstance(into, LazyWeight):
        return False
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__setitem__", "__set__") or (name.startswith("__i") and name[3:-2] in IN_PLACE)


IN_PLACE = frozenset(
    ["add", "sub", "mul", "div", "truediv", "floordiv", "pow", "mod", "and", "or", "xor", "lshift", "rshift", "matmul"]
)
"""Operators that have an in-place form, as `__iadd__`."""
