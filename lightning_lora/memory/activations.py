"""Counts what autograd keeps for the backward, of the step that runs and of the same step in full fine-tuning."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_lora import _compat
from lightning_lora.hosts import Host
from lightning_lora.injection.inject import places
from lightning_lora.weights.sharded import is_sharded

BACKWARD = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
_READS_GRAD = cast(Any, Tensor.grad).__get__
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield what ``tensor`` is stored in: itself, the shard of a DTensor, the packed parts of a quantised tensor."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        for part in parts:
            if isinstance(part, Tensor):  # a DTensor names its mesh too
                yield from plain_tensors(part)
    else:
        yield tensor


def storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Return the storages of ``tensors`` by address: shared ones once, packed ones as they are packed.

    Lazy parameters have none yet.
    """
    present = (tensor for tensor in tensors if not is_lazy(tensor))
    found = (plain.untyped_storage() for tensor in present for plain in plain_tensors(tensor))
    return {storage._cdata: storage for storage in found}


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that ``tensors`` take, each storage counted once."""
    return sum(storage.nbytes() for storage in storages(tensors).values())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of ``module``, with those of adapters that are hidden in it."""
    return {*module.parameters(), *(p for place in places(module) for p in place.adapter.parameters())}


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of ``owner`` while open."""
    own = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


class Saved:
    """Counts the storages that stand saved for a backward: each once, from when it is saved until it is freed.

    What the user's own hooks save instead (``save_on_cpu``, activation checkpoints) is theirs, and is not seen.

    Args:
        ignored: Addresses of storages that do not count, such as those of parameters.
    """

    def __init__(self, ignored: set[int]) -> None:
        self.ignored, self.most, self._nbytes = ignored, 0, 0
        self._standing: dict[int, int] = {}

    def counting(self) -> Any:
        """Count what is saved while open."""
        return torch.autograd.graph.saved_tensors_hooks(lambda tensor: Standing(tensor, self), _unpack)

    def change(self, storage: torch.UntypedStorage, by: int) -> None:
        """Note that one more, or one less, stands for ``storage``."""
        key = storage._cdata
        before = self._standing.pop(key, 0)
        if before + by:
            self._standing[key] = before + by
        if 0 in (before, before + by):
            self._nbytes += by * storage.nbytes()
            self.most = max(self.most, self._nbytes)


class Standing:
    """Holds one saved tensor, and counts it for as long as it is held."""

    def __init__(self, tensor: Tensor, saved: Saved | None) -> None:
        self.tensor = tensor
        self.beside: Standing | None = None
        self._saved = saved
        found = {} if saved is None else storages([tensor])
        self.storages = [storage for key, storage in found.items() if saved is not None and key not in saved.ignored]
        self._count(1)

    def __del__(self) -> None:
        self._count(-1)

    def _count(self, by: int) -> None:
        if self._saved is not None:
            for storage in self.storages:
                self._saved.change(storage, by)


class Watch(TorchFunctionMode):
    """Counts what a step saves, and what it would save in full fine-tuning, without a second step.

    Each call of a torch function runs as it would. Then it runs again on twins without data, among which the parameters
    require gradients as in full fine-tuning, and autograd saves of the twins what it would save. A function that
    :func:`~lightning_lora.gradients.presents.presents` another one is taken for that.

    Args:
        module: With adapters.
        trained: Its parameters that full fine-tuning would train.
        batch: What the step gets.
        manual: Whether the step calls the backward itself, which may be several times.
    """

    def __init__(self, module: nn.Module, trained: set[Tensor], batch: Any, manual: bool) -> None:
        super().__init__()
        self.lora, self.full = Saved(set(storages([*parameters(module), *module.buffers()]))), Saved(set())
        self.reached: set[Tensor] | None = set()
        """The parameters that full fine-tuning would give gradients to; None if that could not be seen."""
        self.unknown = ""
        """Why it is not known what full fine-tuning would save."""
        self.blind = ""
        """Why it is not known what the step saves."""
        self._sharded = module if is_sharded(module) else None
        if self._sharded is not None:
            self.unknown = "FSDP2 exchanges the parameters while a forward runs, and they cannot be followed"
        self._manual, self._trained, self._parameters = manual, trained, set(module.parameters())
        self._fake = _compat.fake_tensors()
        self._mode = self._fake.FakeTensorMode()
        self._twins = WeakTensorKeyDictionary()
        """Tensor -> its twin, or None for a tensor that full fine-tuning would have too, and no gradient for."""
        for tensor in _reachable([batch, *([*vars(child).values()] for child in module.modules())]):
            self._twins[tensor] = None
        self._kept: list[Any] = []
        self._inputs: list[Standing] = []
        """What an activation checkpoint keeps, if anything inside it needs a gradient."""
        self._over = self._counts = self._calling = False
        self._saves: list[Standing] = []
        """What the call that now runs has saved."""
        self._stack = ExitStack()

    # ------------------------------------------------------------------------------------------------ enter and leave

    def begin(self) -> None:
        """Watch from here on."""
        for change in (
            (torch.autograd.graph, "disable_saved_tensors_hooks", self._disabling()),
            (torch.autograd.Function, "apply", classmethod(self._applying())),
            (torch.overrides, "has_torch_function", _has_torch_function),
            _compat.before_compiled_calls(lambda: self._stop("compiled functions are not measured")),
        ):
            if change is not None:
                self._stack.enter_context(replaced(*change))
        torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack).__enter__()
        self._stack.callback(_compat.remove_saved_tensors_hooks, self._pack)
        self.__enter__()
        self._stack.callback(_compat.remove_function_mode, self)
        self._counts = True

    def end(self) -> None:
        """Leave everything as it was before."""
        self._over = True
        self._stack.close()
        self._twins.clear()
        self._kept.clear()
        self._sharded = None

    def _stop(self, reason: str) -> None:
        if not self._over:
            self.blind = self.unknown = reason
            self.end()

    def _disabling(self) -> Callable[[str], Any]:
        """``torch.func`` refuses to run where there are hooks for saved tensors: these go before it asks."""
        original = torch.autograd.graph.disable_saved_tensors_hooks

        def disable(message: str) -> Any:
            if _compat.top_pack_hook() == self._pack:
                self._stop("what runs inside `torch.func` is not measured")
            return original(message)

        return disable

    def _applying(self) -> Callable[..., Any]:
        """Every ``torch.autograd.Function`` becomes a torch function."""
        original = vars(torch.autograd.Function)["apply"]

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            function = original.__get__(None, cls)
            if has_torch_function_unary(None):
                return handle_torch_function(function, (), *args, **kwargs)
            return function(*args, **kwargs)

        return apply

    # -------------------------------------------------------------------------------------------------- the step itself

    def _pack(self, tensor: Tensor) -> Standing:
        if not self._counts or self._over:
            return Standing(tensor, None)
        if self._sharded is not None:  # FSDP2 puts full parameters in the places of shards while a forward runs
            self.lora.ignored |= set(storages(self._sharded.parameters()))
        standing = Standing(tensor, self.lora)
        if self._calling:
            self._saves.append(standing)
        elif not self.unknown:  # an activation checkpoint keeps its inputs
            with self._giving_up("what was saved"), _compat.no_torch_function():
                self._inputs.append(self._beside(standing))
        return standing

    def _beside(self, standing: Standing) -> Standing:
        """Counts for full fine-tuning what was saved by code that cannot be followed."""
        (key,) = storages([standing.tensor])
        like = next((tensor for tensor in self._twins if key in storages([tensor])), None)
        return Standing(self._twin(standing.tensor, known=True) if like is None else self._twin(like), self.full)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._over:
            return func(*args, **kwargs)
        if func is Tensor.__iter__ and args[0].dim():
            return iter(self.__torch_function__(Tensor.unbind, types, args))
        twins, backward = None, func in BACKWARD
        if not (hidden := _compat.top_pack_hook() != self._pack):
            self._inputs.clear()
        self._counts = not backward or bool(kwargs.get("create_graph"))
        if not self.unknown:
            with self._giving_up(func):
                twins = tree_map(self._twins_of, (args, kwargs))
                if backward and self.reached is not None:
                    found = leaves(tensors_in(twins))
                    self.reached |= {p for p in self._trained if id(self._twins.get(p)) in found}
        if backward and func is not torch.autograd.grad and not self._manual:
            self._over = True
        self._calling, self._saves = True, []
        try:
            output = func(*args, **kwargs)
        finally:
            self._calling = False
        if twins is not None and not self._over:
            with self._giving_up(func):
                self._follow(func, (args, kwargs), twins, output, hidden)
        self._counts, self._saves = True, []
        return output

    # ---------------------------------------------------------------------------- the same call on tensors without data

    @contextmanager
    def _giving_up(self, func: Any) -> Iterator[None]:
        try:
            with _compat.quiet_fake_tensors():
                yield
        except Exception as error:  # whatever an operation raises that needs values
            reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
            self.unknown = f"`{getattr(func, '__name__', func)}` could not be followed without data: {reason}"
            self._twins.clear()

    def _twins_of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._twin(value)
        if not isinstance(value, Host):
            return value
        cls: Any = type(value)
        twin = object.__new__(cls.base_class)
        vars(twin).update(vars(value), _modules={})
        for kind in ("_parameters", "_buffers"):
            vars(twin)[kind] = {name: self._twins_of(tensor) for name, tensor in vars(value)[kind].items()}
        return twin

    def _twin(self, tensor: Tensor, known: bool = False) -> Tensor:
        """``tensor`` without data, requiring a gradient if it would in full fine-tuning."""
        twin = self._twins.get(tensor)
        if twin is not None:
            if tensor.is_leaf and tensor.requires_grad and not twin.requires_grad and tensor not in self._parameters:
                twin.requires_grad_()
            return twin
        if tensor in self._parameters:
            twin = self._mode.from_tensor(tensor.detach()).requires_grad_(tensor in self._trained)
        else:
            known = known or tensor in self._twins or not torch.is_grad_enabled() or not tensor.is_floating_point()
            if not known:
                raise LookupError(f"a tensor of shape {tuple(tensor.shape)} came from where torch shows nothing")
            twin = self._mode.from_tensor(tensor if tensor.is_leaf else tensor.detach())
        if not self.lora.ignored.isdisjoint(storages([tensor])):
            self.full.ignored |= set(storages([twin]))
            self._kept.append(twin)
        self._twins[tensor] = twin
        return twin

    def _follow(self, func: Any, given: Any, twins: Any, output: Any, hidden: bool) -> None:
        """Does on ``twins`` what ``func`` did on the ``given`` arguments."""
        outputs = list(tensors_in(output))
        name, owner = getattr(func, "__name__", ""), getattr(func, "__self__", None)
        if name == "__set__":  # of `data` or `requires_grad`
            self._twins[given[0][0]] = None
            return
        if func == _READS_GRAD:
            self._twins.update(dict.fromkeys(outputs))
            return
        inputs = [*tensors_in(twins), *(t for m in twins[0] if isinstance(m, nn.Module) for t in m.parameters())]
        views = not storages(outputs).keys().isdisjoint(storages(tensors_in(given)))
        differentiable = any(twin.requires_grad for twin in inputs) and (torch.is_grad_enabled() or views)
        if not differentiable or not (outputs or name == "__setitem__" or func in BACKWARD):
            for tensor in outputs:
                self._twins.setdefault(tensor, None)
            return
        if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
            self._follow_function(owner, given[0], twins[0], outputs)
            return
        packed: list[Tensor] = []

        def pack(tensor: Tensor) -> Standing:
            tensor = tensor.detach()  # without data, an output comes with its graph, which holds this function
            packed.append(tensor)
            if hidden:
                self._kept += self._inputs
                self._inputs.clear()
            return Standing(tensor, self.full if self._counts and not hidden else None)

        func, result = getattr(func, "base", func), packed
        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack), self._mode:
            with suppress(Exception):  # an operation whose output goes by values, or that has no form without data
                result = func(*twins[0], **twins[1])
            if result is packed:
                packed.clear()
                with _KnownOutputs(outputs) as known:
                    result = func(*twins[0], **twins[1])
                if known.after:
                    raise NotImplementedError(f"{known.after} came after an operation that has no form without data")
        self._pair(outputs, list(tensors_in(result)))
        workspaces = [tensor for tensor in packed if name in RECURRENT and tensor.dtype == torch.uint8]
        if workspaces and not hidden:
            self._add_workspaces(workspaces)

    def _pair(self, outputs: list[Tensor], twins: list[Tensor]) -> None:
        for output, twin in zip(outputs, twins, strict=True):
            if output.shape != twin.shape:
                raise ValueError(f"its output has the shape {tuple(output.shape)}, not {tuple(twin.shape)}")
            self._twins[output] = twin

    def _add_workspaces(self, without_data: list[Tensor]) -> None:
        """Workspaces of recurrent layers, which have no size without data, are those of the real call."""
        real = [standing for standing in self._saves if standing.tensor.dtype == torch.uint8]
        if nbytes(without_data) or len(real) != len(without_data):
            raise ValueError("the workspace of a recurrent layer is not known")
        for standing in real:
            standing.beside = Standing(self._mode.from_tensor(standing.tensor), self.full)

    def _follow_function(self, cls: Any, args: Any, twins: Any, outputs: list[Tensor]) -> None:
        """A function of the user's own saves what it has saved, if it had to give the same gradients."""
        needed = [twin.requires_grad for twin in twins if isinstance(twin, Tensor)]
        given = [tensor.requires_grad for tensor in args if isinstance(tensor, Tensor)]
        if not any(given) or (needed != given and not cls.__module__.startswith("torch.")):
            raise ValueError(f"it is not known what {cls.__name__} would save for gradients that it does not give")
        self.reached = None  # parameters that it has hold of itself
        new = [tensor for tensor in outputs if not any(tensor is arg for arg in args)]
        empty = [self._mode.from_tensor(tensor.detach()) for tensor in new]
        linked = [tensor.requires_grad for tensor in new]
        inputs = [twin for twin in twins if isinstance(twin, Tensor)]
        with self._mode:
            joined = _Link.apply(linked, *empty, *inputs)
        self._pair(new, [one if link else twin for one, link, twin in zip(joined, linked, empty, strict=True)])
        for standing in self._saves:
            if cls.__name__ == "_NoopSaveInputs":  # in older torch
                self._inputs.append(self._beside(standing))
            else:
                standing.beside = self._beside(standing)


def leaves(roots: Iterable[Tensor]) -> set[int]:
    """Return the identities of the leaves in the graph of ``roots``."""
    nodes = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen, found = set(nodes), set()
    while nodes:
        node = nodes.pop()
        found.add(id(getattr(node, "variable", None)))
        new = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= new
        nodes.extend(new)
    return found


class _KnownOutputs(TorchDispatchMode):
    """Gives the real outputs' shapes where an operation cannot: one, which must be the last."""

    def __init__(self, outputs: list[Tensor]) -> None:
        super().__init__()
        self._outputs, self._given = outputs, False
        self.after = ""
        """An operation that came after it, to which an exception here would be the end of the process."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            result = func(*args, **(kwargs or {}))
        except Exception:
            if self._given or not self._outputs or len(func._schema.returns) != len(self._outputs):
                raise
        else:
            if self._given and func is not torch.ops.aten.detach.default and [*tensors_in([result])]:
                self.after = str(func)
            return result
        self._given, device = True, next(tensors_in(args)).device
        new = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) for t in self._outputs]
        return new[0] if len(new) == 1 else tuple(new)


class _Link(torch.autograd.Function):
    """Stands in the graph of twins for a function that cannot be followed."""

    @staticmethod
    def forward(ctx: Any, linked: list[bool], *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = tuple(tensor.clone() for tensor in tensors[: len(linked)])
        ctx.mark_non_differentiable(*(tensor for tensor, link in zip(outputs, linked, strict=True) if not link))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


def _unpack(standing: Standing) -> Tensor:
    return standing.tensor


def _has_torch_function(tensors: Iterable[Any]) -> bool:
    """Torch's own says yes to whatever is asked while there is a mode, and fast paths for inference ask."""
    plain = (Tensor, nn.Parameter)
    return any(isinstance(tensor, Tensor) and type(tensor) not in plain for tensor in tensors)


def _reachable(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors in containers and in objects."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, nn.Module | type | Callable | ModuleType):
        seen.add(id(value))
        # a mapping of another class may make its items when it is asked for them, as those of libraries' models do
        items = (
            value.values() if type(value) in (dict, OrderedDict) else value if isinstance(value, list | tuple) else ()
        )
        for item in (*items, *getattr(value, "__dict__", {}).values()):
            yield from _reachable(item, seen)
