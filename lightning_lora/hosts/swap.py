"""Extends one module by replacing its class, and takes that back."""

from __future__ import annotations

import functools
import types
from typing import Any, ClassVar

from torch import nn


class Swapped(nn.Module):
    """Base of the mixins that :func:`swap` puts before a module's own class."""

    attribute: ClassVar[str]
    """What an instance has besides, as long as it is one."""
    in_copies: ClassVar[bool] = True
    """Whether a copy is one too."""
    base_class: ClassVar[type[nn.Module]]
    mixin: ClassVar[type[Swapped]]
    read: ClassVar[tuple[str, ...]]

    @staticmethod
    def reader(name: str) -> property:
        """What stands in the class for an attribute that the mixin has a hand in."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time, so a pickle or a deep copy names what it is made of."""
        reduced: Any = super().__reduce_ex__(protocol)
        _, args, state, *rest = reduced
        base, mixins = _parts(type(self))
        for mixin, _ in mixins:
            if not mixin.in_copies:
                state = {name: value for name, value in state.items() if name != mixin.attribute}
        kept = [(mixin, read) for mixin, read in mixins if mixin.in_copies]
        return _new, (base, kept, *args[1:]), state, *rest


def swap(module: nn.Module, mixin: type[Swapped], read: tuple[str, ...] = ()) -> None:
    """Makes ``module`` an instance of ``mixin`` besides what it is, with ``mixin.reader`` for each name in ``read``."""
    module.__class__ = _swapped_class(mixin, type(module), read)  # type: ignore[arg-type]


def unswap(module: Swapped, mixin: type[Swapped] = Swapped) -> None:
    """Takes ``mixin``, or the last one, and its attribute from ``module``, which has its own class again."""
    swapped: Any = next(kind for kind in type(module).__mro__ if issubclass(vars(kind).get("mixin", object), mixin))
    delattr(module, swapped.mixin.attribute)
    module.__class__ = _unswapped_class(type(module), swapped)  # type: ignore[arg-type]


@functools.cache
def _unswapped_class(cls: Any, swapped: Any) -> Any:
    """``cls`` with its ancestor ``swapped`` in its own class's place; others, as of ``fully_shard``, stay on top."""
    if cls is swapped:
        return cls.base_class
    if "base_class" in vars(cls):
        return _swapped_class(cls.mixin, _unswapped_class(cls.base_class, swapped), cls.read)
    bases = tuple(_unswapped_class(base, swapped) if issubclass(base, swapped) else base for base in cls.__bases__)
    attributes = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return types.new_class(cls.__name__, bases, exec_body=lambda namespace: namespace.update(attributes))


@functools.cache
def _swapped_class(mixin: Any, base: Any, read: tuple[str, ...]) -> Any:
    """One class for each pair, so that modules of one class stay modules of one class."""
    attributes = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__qualname__": base.__qualname__,
        "base_class": base,
        "mixin": mixin,
        "read": read,
        **{name: mixin.reader(name) for name in read},
    }
    return types.new_class(base.__name__, (mixin, base), exec_body=lambda namespace: namespace.update(attributes))


def _parts(cls: Any) -> tuple[Any, list[tuple[Any, tuple[str, ...]]]]:
    """The class that ``cls`` is made of, and the mixins, with what each reads, in the order in which they were put."""
    mixins: list[tuple[Any, tuple[str, ...]]] = []
    while issubclass(cls, Swapped):
        mixins.insert(0, (cls.mixin, cls.read))
        cls = cls.base_class
    return cls, mixins


def _new(cls: Any, mixins: list[tuple[Any, tuple[str, ...]]], *args: Any) -> nn.Module:
    for mixin, read in mixins:
        cls = _swapped_class(mixin, cls, read)
    return cls.__new__(cls, *args)
