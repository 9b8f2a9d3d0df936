"""Counts what autograd keeps for the backward, of the step that runs and of the same step in full fine-tuning."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import BuiltinFunctionType, FrameType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_lora import _compat
from lightning_lora.hosts import Host
from lightning_lora.injection.inject import places
from lightning_lora.memory.saved import Held, Saved, leaves, storages, tensors_in
from lightning_lora.weights.sharded import is_sharded

BACKWARD = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
_GRAD = (cast(Any, Tensor.grad).__get__, cast(Any, Tensor.grad).__set__)
_CODE = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, FrameType, GeneratorType)


def parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of ``module``, with those of adapters that are hidden in it."""
    return {*module.parameters(), *(p for place in places(module) for p in place.adapter.parameters())}


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
        self.reached: set[Tensor] | None = set()
        """The parameters that full fine-tuning would give gradients to; None if that could not be seen."""
        self.unknown = ""
        """Why it is not known what full fine-tuning would save."""
        self.blind = ""
        """Why it is not known what the step saves."""
        if is_sharded(module):
            self.unknown = "FSDP2 exchanges the parameters while a forward runs, and they cannot be followed"
        self._manual, self._trained, self._parameters = manual, trained, set(module.parameters())
        self._module: nn.Module | None = module
        self.lora = Saved(self._uncounted)
        """What the step saves."""
        self.full = Saved(lambda: [twin for t in self._uncounted() if (twin := self._twins.get(t)) is not None])
        """What full fine-tuning would save."""
        self._owners = {key: tensor for tensor in self._uncounted() for key in storages([tensor])}
        """Parameters and buffers by their storages."""
        self._mode = _compat.fake_tensors().FakeTensorMode()
        self._twins = WeakTensorKeyDictionary()
        """Tensor -> its twin, or None for a tensor that full fine-tuning would have too, and no gradient for."""
        for tensor in _tensors_within(module, batch):
            self._twins[tensor] = None
        self._over, self._counts = False, True
        self._call: list[Held] | None = None
        """What the call that now runs has saved; None between calls."""
        self._inputs: list[Held] = []
        """What an activation checkpoint keeps, if anything inside it needs a gradient."""
        self._stack = ExitStack()
        if _compat.is_compiled(module):
            self._stop("activations of compiled modules are not measured")

    # ------------------------------------------------------------------------------------------------ enter and leave

    def begin(self) -> None:
        """Watch from here on."""
        if self._over:
            return
        for change in (
            (torch.autograd.graph, "disable_saved_tensors_hooks", self._disabling()),
            (torch.autograd.Function, "apply", classmethod(_applying())),
            (torch.overrides, "has_torch_function", _has_torch_function),
            _compat.before_compiled_calls(lambda: self._stop("compiled functions are not measured")),
        ):
            if change is not None:
                self._stack.enter_context(_replaced(*change))
        torch.autograd.graph.saved_tensors_hooks(self._pack, self.lora.give).__enter__()
        self._stack.callback(_compat.remove_saved_tensors_hooks, self._pack)
        self.__enter__()
        self._stack.callback(_compat.remove_function_mode, self)

    def end(self) -> None:
        """Leave everything as it was before."""
        self._over, self.lora.grown, self.full.grown = True, False, False
        self._stack.close()
        self._twins.clear()
        self._owners.clear()
        self._module = None

    def _uncounted(self) -> list[Tensor]:
        return [] if self._module is None else [*parameters(self._module), *self._module.buffers()]

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

    # -------------------------------------------------------------------------------------------------- the step itself

    def _pack(self, tensor: Tensor) -> Held:
        if self._over or not self._counts:
            return Held(tensor)
        held = self.lora.hold(tensor)
        if self._call is not None:
            self._call.append(held)
        elif not self.unknown:  # an activation checkpoint keeps its inputs
            with self._giving_up("what was saved"), _compat.no_torch_function():
                self._inputs.append(self._also_saved(held))
        return held

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._over:
            return func(*args, **kwargs)
        if func is Tensor.__iter__ and args[0].dim():
            return iter(self.__torch_function__(Tensor.unbind, types, args))
        twins, backward = None, func in BACKWARD
        hidden = _compat.top_pack_hook() != self._pack
        if not hidden:
            self._inputs = []
        self._counts = not backward or bool(kwargs.get("create_graph"))
        if not self.unknown:
            with self._giving_up(func):
                twins = tree_map(self._twins_of, (args, kwargs))
                if backward and self.reached is not None:
                    found = leaves(tensors_in(twins))
                    self.reached |= {p for p in self._trained if id(self._twins.get(p)) in found}
        if backward and func is not torch.autograd.grad and not self._manual:
            self.lora.measure()
            self.full.measure()
            self._over = True
        self._call = []
        try:
            output = func(*args, **kwargs)
        finally:
            saved, self._call = self._call, None
        if twins is not None and not self._over:
            with self._giving_up(func):
                self._follow(func, (args, kwargs), twins, output, saved, hidden)
        self._counts = True
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
        """Return ``tensor`` without data, requiring a gradient if it would in full fine-tuning."""
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
            for key in storages([tensor]):  # of tensors in one storage the twins are, while there is one
                if (owner := self._owners.get(key)) is not None and owner is not tensor:
                    self._twin(owner, known=True)
            twin = self._mode.from_tensor(tensor if tensor.is_leaf else tensor.detach())
        self._twins[tensor] = twin
        return twin

    def _also_saved(self, held: Held) -> Held:
        """Save for full fine-tuning what was saved by code that cannot be followed."""
        (key,) = storages([held.tensor])
        like = next((tensor for tensor in self._twins if key in storages([tensor])), held.tensor)
        return self.full.hold(self._twin(like, known=True))

    def _follow(self, func: Any, given: Any, twins: Any, output: Any, saved: list[Held], hidden: bool) -> None:
        """Do on ``twins`` what ``func`` did on the ``given`` arguments."""
        outputs = list(tensors_in(output))
        name, owner = getattr(func, "__name__", ""), getattr(func, "__self__", None)
        if func in _GRAD or name == "__set__":
            unlike = outputs if func in _GRAD else given[0][:1]  # whose `data` or `requires_grad` were set
            self._twins.update(dict.fromkeys(unlike))
            return
        inputs = [*tensors_in(twins), *(t for m in twins[0] if isinstance(m, nn.Module) for t in m.parameters())]
        views = not storages(outputs).keys().isdisjoint(storages(tensors_in(given)))
        differentiable = any(twin.requires_grad for twin in inputs) and (torch.is_grad_enabled() or views)
        if not differentiable or not (outputs or name == "__setitem__" or func in BACKWARD):
            for tensor in outputs:
                self._twins.setdefault(tensor, None)
            return
        if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
            self._follow_function(owner, given[0], twins[0], outputs, saved)
            return
        packed: list[Held] = []

        def pack(tensor: Tensor) -> Held:
            tensor = tensor.detach()  # without data, an output comes with its graph, which holds this function
            counts = self._counts and not hidden
            packed.append(self.full.hold(tensor) if counts else Held(tensor, beside=self._inputs))
            return packed[-1]

        base = getattr(func, "base", func)
        with torch.autograd.graph.saved_tensors_hooks(pack, self.full.give), self._mode, _KnownShapes(outputs):
            results = list(tensors_in(base(*twins[0], **twins[1])))
        for tensor, twin in zip(outputs, results, strict=True):
            if tensor.shape != twin.shape:
                raise ValueError(f"its output has the shape {tuple(tensor.shape)}, not {tuple(twin.shape)}")
            self._twins[tensor] = twin
        if base is func and not hidden:
            self._size_workspaces(
                _besides(packed, [*inputs, *results]), _besides(saved, [*tensors_in(given), *outputs])
            )

    def _size_workspaces(self, packed: list[Held], saved: list[Held]) -> None:
        """Give what a call saves besides its inputs and outputs the sizes that it had in the real call.

        Without data, the workspaces of recurrent layers are empty, and some statistics have another dtype.
        """
        if len(packed) == len(saved):
            for held, real in zip(packed, saved, strict=True):
                if held.tensor.dtype != real.tensor.dtype or held.tensor.shape != real.tensor.shape:
                    held.tensor = self._mode.from_tensor(real.tensor)
        elif not all(held.tensor.numel() for held in packed):
            raise ValueError("the size of its workspace is not known")

    def _follow_function(self, cls: Any, args: Any, twins: Any, outputs: list[Tensor], saved: list[Held]) -> None:
        """Let a function of the user's own save what it has saved, if it had to give the same gradients."""
        inputs = [twin for twin in twins if isinstance(twin, Tensor)]
        needed = [twin.requires_grad for twin in inputs]
        given = [tensor.requires_grad for tensor in args if isinstance(tensor, Tensor)]
        if not any(given) or (needed != given and not cls.__module__.startswith("torch.")):
            raise ValueError(f"it is not known what {cls.__name__} would save for gradients that it does not give")
        self.reached = None  # parameters that it has hold of itself
        also = [self._also_saved(held) for held in saved]
        if cls.__name__ == "_NoopSaveInputs":  # of an activation checkpoint, in older torch
            self._inputs += also
        for tensor in outputs:
            if not any(tensor is arg for arg in args):
                twin = self._mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)
                twin.kept_beside = inputs, also  # a leaf is kept for as long as a graph that leads to it
                self._twins[tensor] = twin


class _KnownShapes(TorchDispatchMode):
    """Gives the real outputs' shapes where an operation has none without data: one, which is the last."""

    def __init__(self, outputs: list[Tensor]) -> None:
        super().__init__()
        self._outputs: list[Tensor] = outputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            if not self._outputs or len(func._schema.returns) != len(self._outputs):
                raise
        outputs, self._outputs, device = self._outputs, [], next(tensors_in(args)).device
        new = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) for t in outputs]
        return new[0] if len(new) == 1 else tuple(new)


def _applying() -> Callable[..., Any]:
    """Return an ``apply`` that makes a torch function of every ``torch.autograd.Function``."""
    original = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        function = original.__get__(None, cls)
        if has_torch_function_unary(None):
            return handle_torch_function(function, (), *args, **kwargs)
        return function(*args, **kwargs)

    return apply


def _has_torch_function(tensors: Iterable[Any]) -> bool:
    """Torch's own says yes to whatever is asked while there is a mode, and fast paths for inference ask."""
    plain = (Tensor, nn.Parameter)
    return any(isinstance(tensor, Tensor) and type(tensor) not in plain for tensor in tensors)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


def _besides(held: list[Held], tensors: Iterable[Tensor]) -> list[Held]:
    """Return those of ``held`` that are in no storage of ``tensors``."""
    known = storages(tensors)
    return [one for one in held if known.keys().isdisjoint(storages([one.tensor]))]


def _tensors_within(*roots: Any) -> Iterator[Tensor]:
    """Yield the tensors in containers and objects, at any depth, without calling any code of theirs."""
    found, seen = list(roots), set()
    while found:
        thing = found.pop()
        if issubclass(type(thing), Tensor):
            yield thing
        elif id(thing) not in seen and not issubclass(type(thing), _CODE):
            seen.add(id(thing))
            found += gc.get_referents(thing)
