"""A module that carries adapters: its own class, extended by one generated for it.

The generated class has the module's class as its first base, since Python can exchange classes of one layout only, and
finds the layout of a class with another base in front different where ``ABC`` or ``Generic`` stand first in it. What is
overridden stands in the generated class itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_lora import _compat
from lightning_lora.adapters import Adapter
from lightning_lora.adapters.adapter import Snapshot
from lightning_lora.errors import LoRAError, warn
from lightning_lora.gradients import projected
from lightning_lora.gradients.transforms import is_watched
from lightning_lora.hosts import lazy
from lightning_lora.weights import storage_of
from lightning_lora.weights.digest import sample
from lightning_lora.weights.sharded import is_shard

Forward = Callable[..., Tensor]


class Host(nn.Module):
    """What every module with adapters is besides an instance of its own class."""

    lora: nn.Module
    """The adapter of ``weight`` if that alone is adapted; else a dictionary by names of parameters."""
    base_class: ClassVar[type[nn.Module]]
    """The module's own class."""
    made_of: ClassVar[tuple[Any, ...]]
    """The arguments of :func:`host_class`, for copies and pickles."""

    def adapted(self) -> Mapping[str, Adapter]:
        """Return the adapters by the names of the module's own parameters."""
        if isinstance(self.lora, Adapter):
            return {"weight": self.lora}
        return cast(Mapping[str, Adapter], dict(cast(nn.ModuleDict, self.lora).items()))

    def factors(self, parameter: str) -> str:
        """Return what stands before the names of A and B of ``parameter`` in this module's state dict."""
        return "lora." if isinstance(self.lora, Adapter) else f"lora.{parameter}."

    @property
    def holds_increment(self) -> bool:
        """Whether the parameters are W = W0 + increment, to be kept so after each step; else they are W0, frozen."""
        return any(adapter.holds for adapter in self.adapted().values())

    @property
    def is_exact(self) -> bool:
        """Whether the forward takes the adapter into account by thin products, and no full gradient is formed."""
        return self.made_of[2] is not None


class Adapters(nn.ModuleDict):
    """The adapters of several parameters of one module, by their names."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Leave nothing in a state dict that has merged weights, not even an entry in its metadata."""
        destination = kwargs.get("destination", args[0] if args else None)
        if destination is not None and any(cast(Adapter, adapter).presents_merged for adapter in self.values()):
            return destination
        return super().state_dict(*args, **kwargs)


def adopt(
    module: nn.Module, adapters: Mapping[str, Adapter], forward: Forward | None = None, read: bool = True
) -> None:
    """Make ``module`` carry ``adapters``, named by its parameters.

    Args:
        module: Any module that has the parameters.
        adapters: Name of a parameter -> its adapter.
        forward: A forward that takes the adapter of ``weight`` into account by itself; by default the module's own,
            which reads W.
        read: Whether reading the parameters gives W; else, as where they are stored quantised, themselves.
    """
    own: Any = type(module)
    kind = host_class(own, tuple(adapters) if read else (), forward)
    module.lora = adapters["weight"] if list(adapters) == ["weight"] else Adapters(adapters)
    module.__class__ = kind


def release(host: Host) -> None:
    """Make ``host`` what it was before :func:`adopt`, with its parameters as they stand."""
    vars(host).pop("lora", None)
    host._modules.pop("lora", None)
    kind: Any = type(host)
    host.__class__ = _without_host(kind)


@functools.cache
def _without_host(kind: Any) -> Any:
    """Return ``kind`` without the generated class in it; others on top of that, as of ``fully_shard``, stay."""
    if "made_of" in vars(kind):
        return kind.base_class
    bases = tuple(_without_host(base) if issubclass(base, Host) else base for base in kind.__bases__)
    attributes = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, bases, attributes)


@functools.cache
def host_class(base: Any, parameters: tuple[str, ...], forward: Forward | None) -> Any:
    """Return the class of hosts of class ``base``: one for each combination, so that equal modules stay so."""
    overridden: dict[str, Any] = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__qualname__": base.__qualname__,
        "base_class": base,
        "made_of": (base, parameters, forward),
        **{name: property(_reader(name), _refuse_assignment) for name in parameters},
        **{method.__name__: method for method in _METHODS},
    }
    if forward is not None:
        overridden["forward"] = forward
    if issubclass(base, nn.RNNBase):
        overridden["_flat_weights"] = property(_flat_weights, lambda *_: None)
        overridden["flatten_parameters"] = lambda self: None  # weights are formed anew in each forward
    bases = (Host,) if base is nn.Module else (base, Host)
    with _unheard(base):
        return type(base)(base.__name__, bases, overridden)


@contextmanager
def _unheard(base: Any) -> Iterator[None]:
    """Keep ``base`` from hearing of a subclass: its ``__init_subclass__`` may ask for arguments, or keep a registry."""
    own = vars(base).get("__init_subclass__")
    base.__init_subclass__ = classmethod(lambda cls, **_: None)
    try:
        yield
    finally:
        if own is None:
            del base.__init_subclass__
        else:
            base.__init_subclass__ = own


# ------------------------------------------------------------------------------------------------------------- reading


def _reader(name: str) -> Callable[[Host], Tensor]:
    """Return the getter of parameter ``name``; a plain function, as torch 2.6's compiler rejects other callables."""

    def read(host: Host) -> Tensor:
        weight = host._parameters[name]
        assert weight is not None
        lora = host.lora
        adapter = lora if isinstance(lora, Adapter) else lora[name]  # type: ignore[index]
        try:
            return _read(weight, adapter, host.training)
        except AttributeError as error:  # which would send Python to `nn.Module.__getattr__`, and that would give W0
            raise RuntimeError(f"Reading the adapted {name!r} failed: {error}") from error

    return read


def _read(weight: Tensor, adapter: Adapter, training: bool) -> Tensor:
    if adapter.is_aside:
        return weight
    if is_shard(weight) or is_shard(adapter.A):
        return weight  # FSDP2 reads and puts back, one after another, what no forward is to see
    if adapter.holds:
        return projected.read(weight, adapter) if is_watched() else weight
    return lazy.read(weight, adapter, training)


def _refuse_assignment(host: Host, value: Any) -> None:
    raise LoRAError(
        f"A weight of {type(host).__name__} has an adapter and cannot be replaced now. Replace it inside"
        " `with lightning_lora.merged(module):`, or before the adapters are put in."
    )


def _flat_weights(rnn: Any) -> list[Tensor]:
    """Return the list that ``nn.RNNBase`` reads its parameters from, read anew."""
    return [getattr(rnn, name) for name in _compat.weight_names(rnn)]


# ---------------------------------------------------------------------------------------------- overridden by all hosts


def __setattr__(self: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor) and isinstance(vars(type(self)).get(name, getattr(type(self), name, None)), property):
        current = self._parameters.get(name)
        if current is not None and current is not value and name in self.adapted():
            if not is_shard(current) and not is_shard(value):
                _refuse_assignment(self, value)
            self._parameters[name] = value  # FSDP2 exchanges a parameter's shard and the full one
            return
    self.base_class.__setattr__(self, name, value)


def __reduce_ex__(self: Any, protocol: Any) -> Any:
    """Name what the class is made of, since it is made at run time."""
    reduced: Any = self.base_class.__reduce_ex__(self, protocol)
    _, args, *rest = reduced
    return _new, (*type(self).made_of, *args[1:]), *rest


def _new(base: Any, parameters: tuple[str, ...], forward: Forward | None, *args: Any) -> nn.Module:
    kind = host_class(base, parameters, forward)
    return kind.__new__(kind, *args)


def _apply(self: Any, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
    result = self.base_class._apply(self, fn, *args, **kwargs)
    if "lora" in vars(self):  # hidden from `modules()`
        self.lora._apply(fn, *args, **kwargs)
    return result


def _save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
    self.base_class._save_to_state_dict(self, destination, prefix, keep_vars)
    for parameter, adapter in self.adapted().items():
        key = f"{prefix}{parameter}"
        weight = self._parameters[parameter]
        if not adapter.presents_merged or keep_vars or storage_of(self, parameter).read_only:
            continue
        if not adapter.holds and key in destination:
            if adapter.given_was_written():
                warn(_WRITTEN)
            destination[key] = _merged(adapter, weight)
            if adapter.saving is None:
                adapter.watch_given(destination[key])
        if adapter.saving is None:
            adapter.remember(sample(weight) if adapter.holds else "")


_WRITTEN = (
    "What `state_dict()` of a module with adapters gave was written to, and the module has not changed by it: where W0"
    " is frozen, it is a copy with the increment added. An average of weights (EMA) that writes to the state dict of a"
    " copy of the module stands still so. Use `gradient='merged'`, make the copy before `fit`, or load what was written"
    " with `load_state_dict`."
)


def _merged(adapter: Adapter, weight: Tensor) -> Tensor:
    """Return W; for a file, on the CPU, and once for a weight that stands in several places."""
    if adapter.saving is None:
        return adapter.folded_into(weight)
    if adapter not in adapter.saving:
        adapter.saving[adapter] = adapter.folded_into(weight).cpu()
    return adapter.saving[adapter]


def _load_from_state_dict(self: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Take a plain state dict as what it is: final weights, with no increment."""
    for parameter, adapter in self.adapted().items():
        adapter.given_was_written()  # and is loaded now
        key, before = f"{prefix}{parameter}", f"{prefix}{self.factors(parameter)}"
        given, own = state_dict.get(key), self._parameters[parameter]
        stored = storage_of(self, parameter)
        if given is not None and (misfit := stored.misfit(given)) is not None:
            args[-1].append(f"{key} {misfit}")
            state_dict = {name: value for name, value in state_dict.items() if name != key}
            given = None
        names = list(adapter.state_dict())
        if given is None or any(f"{before}{name}" in state_dict for name in names):
            continue
        if not adapter.presents_merged:
            for name, value in adapter.without_increment(given).items():
                state_dict[f"{before}{name}"] = value
        elif stored.read_only or _is_merged(given, own, adapter):  # what `state_dict()` gave: not one bit changes
            state_dict[key] = own.detach()
        elif (earlier := _remembered(given, own, adapter)) is not None:
            adapter.recall(earlier)
            state_dict[key] = given if adapter.holds else own.detach()
        else:
            adapter.load_tensors(adapter.without_increment(given.to(own.device)))
    self.base_class._load_from_state_dict(self, state_dict, prefix, *args)


def _is_merged(given: Tensor, weight: Tensor, adapter: Adapter) -> bool:
    """Return whether ``given`` is the merged weight, bit for bit."""
    if given.shape != weight.shape or given.dtype != weight.dtype:
        return False
    merged = weight if adapter.holds else adapter.folded_into(weight)
    return torch.equal(given.to(merged.device), merged)


def _remembered(given: Tensor, weight: Tensor, adapter: Adapter) -> Snapshot | None:
    """Return what the adapter was when ``state_dict()`` gave ``given``, if that was one of the last times."""
    for earlier in reversed(adapter.remembered):
        if adapter.holds:
            found = sample(given) == earlier.weight  # W is loaded as it is given; a sample tells which it is
        else:
            found = _is_merged(given, weight, adapter.with_tensors(earlier.tensors))
        if found:
            return earlier
    return None


def __prepare_scriptable__(self: Any) -> nn.Module:
    """Refuse ``torch.jit.script``, which calls this before it fails."""
    raise LoRAError(
        f"TorchScript cannot compile a {type(self).__name__} with an adapter. `merge` the module first, or a deep"
        " copy of it; or use `torch.export.export` or `torch.jit.trace`, which take it as it is."
    )


_METHODS = (
    __setattr__,
    __reduce_ex__,
    _apply,
    _save_to_state_dict,
    _load_from_state_dict,
    __prepare_scriptable__,
)
