"""What reading a weight gives where the parameter is W0: a handle on (W0, A, B) that is W to whoever uses it.

It is a tensor without data, the output of an autograd Function of A and B, so whatever consumes it gives its gradient
to them: G is projected as it arrives. Its shape, dtype and device are known without W. Products with it take the thin
path, since then the operation is known exactly; transposing it and selecting from a stack give other handles. Anything
else forms W, once for a call, and autograd keeps the handle in its place and forms W again in the backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora import _compat
from lightning_lora.adapters import Adapter
from lightning_lora.errors import LoRAError
from lightning_lora.gradients import factored
from lightning_lora.gradients.autocast import without_autocast
from lightning_lora.gradients.factored import rescaled
from lightning_lora.gradients.paths import ConvolutionPath, LookupPath
from lightning_lora.gradients.presents import presents
from lightning_lora.gradients.transforms import is_transformed
from lightning_lora.weights.full_precision import full_precision


@presents(lambda weight, *_: weight)
def read(weight: Tensor, adapter: Adapter, training: bool) -> Tensor:
    """Return W = gain (W0 + increment), in the shape and dtype of ``weight``, which is W0 and has no gradient.

    ``training`` is whether dropout applies, where W meets the inputs in a product.
    """
    A, B = adapter.increment()
    left, right = (A, B) if adapter.transposed else (B, A)
    gain = adapter.gain(weight)
    if torch.compiler.is_compiling() or is_transformed():
        return _formed(weight, left, right, gain, adapter.transposed, adapter.scale)
    dropout = adapter.dropout if training else 0.0
    return _lazy(weight, left, right, gain, adapter.transposed, adapter.scale, dropout)


def _formed(base: Tensor, left: Tensor, right: Tensor, gain: Tensor | None, gain_last: bool, scale: float) -> Tensor:
    """Form W, rounded once to the dtype of ``base``, which it is bit for bit where the increment is zero."""
    dtype = torch.promote_types(torch.promote_types(base.dtype, left.dtype), torch.float32)
    # the compiler takes no such setting for a part of what it compiles: there the product is as precise as the model's
    precision = contextlib.nullcontext() if torch.compiler.is_compiling() else full_precision()
    with torch.autocast(base.device.type, enabled=False), precision:
        # less a positive zero, since -0.0 plus one is no longer -0.0
        product = ((-left).mT.to(dtype) @ right.to(dtype)).view(base.shape)
        W = torch.sub(base.to(dtype), product, alpha=scale)
    if gain is not None:
        W = W * _spread(gain, base.dim(), gain_last)
    return W.to(base.dtype)


def _spread(gain: Tensor, dims: int, last: bool) -> Tensor:
    """Shape ``gain``, of rows or of columns, to be multiplied with a weight of ``dims`` dimensions."""
    return gain.unsqueeze(-2) if last else gain.view(*gain.shape, *(1 for _ in range(dims - gain.dim())))


class LazyWeight(Tensor):
    """W = gain (W0 + scale left^T right), not formed."""

    base: Tensor
    left: Tensor
    right: Tensor
    gain: Tensor | None
    gain_last: bool
    scale: float
    dropout: float

    def state(self) -> tuple[Any, ...]:
        """Return all that W is formed of."""
        return self.base, self.left, self.right, self.gain, self.gain_last, self.scale, self.dropout

    @torch.no_grad()
    def form(self) -> Tensor:
        """Form W, which no gradient goes through."""
        return _formed(self.base, self.left, self.right, self.gain, self.gain_last, self.scale)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        rank = self.left.shape[-2]
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, rank={rank})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with _compat.no_function_of_subclasses():
                return func(*args, **kwargs)
        if (special := _SPECIAL.get(func)) is not None:
            with _compat.no_function_of_subclasses():
                result = special(*args, **kwargs)
            if result is not NotImplemented:
                return result
        _refuse_writing(func, args, kwargs)
        with _forming() as form:
            args, kwargs = _compat.tree_map_only(LazyWeight, form, (args, dict(kwargs)))
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Form W where C++ comes upon a handle."""
        if func is torch.ops.aten.detach.default:
            return _bare(*args[0].state())
        args, kwargs = _compat.tree_map_only(LazyWeight, LazyWeight.form, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _bare(*state: Any) -> LazyWeight:
    base, left, right, gain, *rest = state
    left, right, gain = left.detach(), right.detach(), None if gain is None else gain.detach()
    lazy: LazyWeight = Tensor._make_wrapper_subclass(
        LazyWeight, base.shape, strides=base.stride(), dtype=base.dtype, device=base.device
    )
    lazy.base, lazy.left, lazy.right, lazy.gain = base, left, right, gain
    lazy.gain_last, lazy.scale, lazy.dropout = rest
    return lazy


def _lazy(*state: Any) -> LazyWeight:
    """Return a handle through which gradients go to its factors and its gain."""
    _, left, right, gain, *_ = state
    watched = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (left, right, gain))
    if not watched:
        return _bare(*state)
    lazy: LazyWeight = _Handle.apply(left, right, gain, state)
    lazy.left, lazy.right, lazy.gain = left, right, gain
    return lazy


class _Handle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, gain: Tensor | None, state: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(left, right, gain)
        ctx.rest = state[0], *state[4:]
        return _bare(*state)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        left, right, gain = ctx.saved_tensors
        base, gain_last, scale, _ = ctx.rest
        G, dgain = gradient.reshape(*left.shape[:-2], left.shape[-1], right.shape[-1]), None
        if gain is not None:
            if ctx.needs_input_grad[2]:
                V = _formed(base.to(gain.dtype), left, right, None, gain_last, scale).view(G.shape)
                dgain = (G * V).sum(-2 if gain_last else -1)
            G = (G * _spread(gain, G.dim(), gain_last)).to(G.dtype)
        dleft = scale * (right.to(G.dtype) @ G.mT) if ctx.needs_input_grad[0] else None
        dright = scale * (left.to(G.dtype) @ G) if ctx.needs_input_grad[1] else None
        return dleft, dright, dgain, None


class _Form(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lazy: LazyWeight) -> Tensor:
        return lazy.form()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Again:
    """Forms W again in a backward, and keeps it until whatever was saved of it has been asked for."""

    def __init__(self, lazy: LazyWeight) -> None:
        self.lazy = _bare(*lazy.state())
        self.versions = [(t, t._version) for t in (lazy.base, lazy.left, lazy.right, lazy.gain) if t is not None]
        self.saved = self.asked = 0
        self.W: Tensor | None = None

    def form(self) -> Tensor:
        if any(tensor._version != version for tensor, version in self.versions):
            raise RuntimeError("A weight or its adapter was changed in place between the forward and its backward.")
        W = self.lazy.form() if self.W is None else self.W
        self.asked += 1
        self.W = W if self.asked % self.saved else None
        return W


@contextlib.contextmanager
def _forming() -> Iterator[Callable[[LazyWeight], Tensor]]:
    """Yield a function that forms a handle's W, once; what autograd saves of this W inside is saved as the handle."""
    formed: dict[int, Tensor] = {}
    handles: dict[int, _Again] = {}

    def form(lazy: LazyWeight) -> Tensor:
        if id(lazy) not in formed:
            W = _Form.apply(lazy) if lazy.requires_grad and torch.is_grad_enabled() else lazy.form()
            formed[id(lazy)] = W
            handles[W.untyped_storage().data_ptr()] = _Again(lazy)
        return formed[id(lazy)]

    outer = _compat.saved_tensors_hooks()

    def pack(tensor: Tensor) -> Any:
        again = None if type(tensor) is LazyWeight else handles.get(_address(tensor))
        if again is None:
            return None, tensor if outer is None else outer[0](tensor)
        again.saved += 1
        return again, (tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(packed: Any) -> Tensor:
        again, rest = packed
        if again is not None:
            return again.form().as_strided(*rest)
        return rest if outer is None else outer[1](rest)

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
    try:
        hooks.__enter__()
    except RuntimeError:  # where somebody forbids them, W is saved as it is
        yield form
        return
    try:
        yield form
    finally:
        hooks.__exit__()
        formed.clear()


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # it has no storage
        return -1


def _refuse_writing(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    name = getattr(func, "__name__", "")
    in_place = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
    written = [args[0] if args else kwargs.get("tensor")] if in_place else []
    if any(isinstance(tensor, LazyWeight) for tensor in (*written, kwargs.get("out"))):
        raise LoRAError(
            f"`{name}` would write to a weight that is W0 and the increment of an adapter, and what it wrote would be"
            " lost. Use `with lightning_lora.merged(module):` and write to the plain module's weight inside."
        )


# fmt: off
_IN_PLACE = (
    "set", "setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift",
    "irshift",
)
# fmt: on
_WRITES = frozenset(f"__{name}__" for name in _IN_PLACE)


# --------------------------------------------------------------------------------- operations that are known exactly


def _plain(*tensors: Any) -> bool:
    return not any(isinstance(tensor, LazyWeight) for tensor in tensors)


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not _plain(input, bias) or weight.dim() != 2 or (weight.gain is not None and weight.gain_last):
        return NotImplemented
    y = factored.linear(input, weight.base, bias, weight.right, weight.left, weight.scale, weight.dropout)
    return rescaled(y, weight.gain, bias)


def _matmul(input: Any, other: Any) -> Any:
    if isinstance(input, LazyWeight) or not isinstance(other, LazyWeight) or other.dim() != 2:
        return NotImplemented
    return _linear(input, _transposed(other))


def _addmm(bias: Any, input: Any, other: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None) -> Any:
    if out is not None or beta != 1 or alpha != 1 or bias.dim() != 1 or not isinstance(other, LazyWeight):
        return NotImplemented
    return _linear(input, _transposed(other), bias) if _plain(bias, input) and other.dim() == 2 else NotImplemented


def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq or sparse or weight.dim() != 2 or not _plain(input):
        return NotImplemented
    if weight.gain is not None and not weight.gain_last:
        return NotImplemented
    y = F.embedding(input, weight.base, padding_idx)
    left, right = weight.left.to(y.dtype), weight.right.to(y.dtype)
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    return rescaled(LookupPath(padding).add(y, input, left, right, weight.scale), weight.gain, None)


def _convolve(operation: Callable[..., Tensor]) -> Callable[..., Any]:
    def convolve(
        input: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        is_stack = weight.left.dim() != 2
        if not _plain(input, bias) or is_stack or (weight.gain is not None and weight.gain_last):
            return NotImplemented
        y = operation(input, weight.base, bias, stride, padding, dilation, groups)
        x = F.dropout(input, weight.dropout)
        A, B = weight.right.to(x.dtype), weight.left.to(x.dtype)
        path = ConvolutionPath(
            lambda x, filters: operation(x, filters, None, stride, padding, dilation, groups), weight.shape, groups
        )
        return rescaled(path.add(y, x, A, B, weight.scale), weight.gain, bias, channel=1 - weight.dim())

    return convolve


def _transposed(weight: Any) -> LazyWeight:
    base, left, right, gain, gain_last, *rest = weight.state()
    return _lazy(base.mT, right, left, gain, not gain_last, *rest)


def _transpose(weight: Any, dim0: Any = 0, dim1: Any = 1) -> Any:
    dims = {d % weight.dim() for d in (dim0, dim1) if isinstance(d, int)}
    turns = dims == {weight.dim() - 2, weight.dim() - 1}
    return _transposed(weight) if turns and weight.left.dim() == weight.dim() else NotImplemented


def _turn(weight: Any) -> Any:
    return _transposed(weight) if weight.dim() == 2 else NotImplemented


def _turn_last(weight: Any) -> Any:
    return _transposed(weight) if weight.left.dim() == weight.dim() else NotImplemented


def _item(weight: Any, index: Any) -> Any:
    if not isinstance(weight, LazyWeight) or weight.left.dim() != 3 or isinstance(index, bool):
        return NotImplemented
    if isinstance(index, Tensor) and (index.dim() or index.dtype.is_floating_point or index.dtype == torch.bool):
        return NotImplemented
    if not isinstance(index, int | Tensor):
        return NotImplemented
    base, left, right, gain, *rest = weight.state()
    return _lazy(base[index], left[index], right[index], None if gain is None else gain[index], *rest)


def _select(weight: Any, dim: int, index: int) -> Any:
    return _item(weight, index) if dim in (0, -weight.dim()) else NotImplemented


def _unbind(weight: Any, dim: int = 0) -> Any:
    if weight.left.dim() != 3 or dim not in (0, -weight.dim()):
        return NotImplemented
    base, left, right, gain, *rest = weight.state()
    gains = [None] * len(base) if gain is None else gain.unbind()
    return tuple(_lazy(*one, *rest) for one in zip(base.unbind(), left.unbind(), right.unbind(), gains, strict=True))


def _iterate(weight: Any) -> Any:
    parts = _unbind(weight)
    return parts if parts is NotImplemented else iter(parts)


def _detached(weight: Any) -> LazyWeight:
    """Return a handle still, so that what would write to it is refused."""
    return _bare(*weight.state())


_ATTRIBUTES: Any = Tensor
_SPECIAL: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    **{operation: _convolve(operation) for operation in (F.conv1d, F.conv2d, F.conv3d)},
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul),
    Tensor.__rmatmul__: lambda weight, input: _matmul(input, weight),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    **dict.fromkeys((torch.t, Tensor.t, _ATTRIBUTES.T.__get__), _turn),
    _ATTRIBUTES.mT.__get__: _turn_last,
    **dict.fromkeys((torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes), _transpose),
    Tensor.__getitem__: _item,
    **dict.fromkeys((torch.select, Tensor.select), _select),
    **dict.fromkeys((torch.unbind, Tensor.unbind), _unbind),
    Tensor.__iter__: _iterate,
    **dict.fromkeys((torch.detach, Tensor.detach, _ATTRIBUTES.data.__get__), _detached),
}
# fmt: off
_METADATA: frozenset[Any] = frozenset((
    *(getattr(Tensor, name).__get__ for name in (
        "shape", "dtype", "device", "requires_grad", "grad_fn", "is_leaf", "ndim", "layout", "grad", "_grad", "names",
        "is_cuda", "is_cpu", "is_xpu", "is_mps", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn",
        "itemsize", "nbytes", "output_nr", "retains_grad", "_version", "_backward_hooks",
    ) if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in (
        "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "is_complex",
        "is_floating_point", "is_signed", "is_inference", "is_conj", "is_neg", "is_same_size", "element_size",
        "get_device", "data_ptr", "register_hook", "retain_grad", "requires_grad_", "__len__", "__hash__",
    )),
    Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    torch.is_floating_point, torch.is_complex, torch.numel,
))
"""What the handle answers by itself."""
# fmt: on
