"""Wraps methods of one object, on the instance, so that its class stays the user's class."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

_ABSENT = object()


class InstanceHooks:
    """Wrappers of methods of one object, kept in its ``__dict__``, where they stand before the methods of its class.

    Hooks that a user has set on the instance are wrapped like those of the class. A wrapper holds the object weakly and
    carries no ``__wrapped__``: Lightning's ``is_overridden`` follows that to the class and would skip a hook that the
    class leaves empty. Copies and pickles of the object leave all wrappers out.

    Args:
        owner: A LightningModule or a strategy. It needs a ``__dict__``.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = weakref.ref(owner)
        self._wrappers: dict[str, Callable[..., Any]] = {}
        self._replaced: dict[str, Any] = {}
        self.ran: set[str] = set()
        """Names of the wrapped methods that have been called."""

    def wrap(self, name: str, around: Callable[..., Any]) -> None:
        """Send each call of the method ``name`` to ``around(original, *args, **kwargs)``.

        Where the wrapper has been replaced by another function since, that function is wrapped anew.
        """
        owner = self._owner()
        if owner is None or vars(owner).get(name, _ABSENT) is self._wrappers.get(name):
            return
        reference, own, ran = self._owner, vars(owner).get(name, _ABSENT), self.ran

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            owner = reference()
            if own is not _ABSENT:
                original = own
            elif hasattr(type(owner), name):
                original = getattr(type(owner), name).__get__(owner)
            else:  # `__getstate__`, which `object` has from Python 3.11 on
                original = lambda: vars(owner)  # noqa: E731
            ran.add(name)
            return around(original, *args, **kwargs)

        self._wrappers[name], self._replaced[name] = wrapper, own
        vars(owner)[name] = wrapper
        if name != "__getstate__":
            self.wrap("__getstate__", self._without_wrappers)

    def unwrap(self, name: str) -> None:
        """Put back what the wrapper of ``name`` stood for."""
        owner, wrapper = self._owner(), self._wrappers.pop(name, None)
        own = self._replaced.pop(name, _ABSENT)
        if owner is None or wrapper is None or vars(owner).get(name) is not wrapper:
            return
        del vars(owner)[name]
        if own is not _ABSENT:
            vars(owner)[name] = own

    def remove(self, but: str = "") -> None:
        """Put back everything, except for the method ``but`` if one is named."""
        for name in list(self._wrappers):
            if not but or name not in (but, "__getstate__"):
                self.unwrap(name)

    def _without_wrappers(self, original: Callable[[], Any]) -> Any:
        state = original()
        attributes = state[0] if isinstance(state, tuple) else state  # a tuple where the class has slots
        attributes = dict(attributes)
        for name, wrapper in self._wrappers.items():
            if attributes.get(name) is wrapper:
                del attributes[name]
                if self._replaced[name] is not _ABSENT:
                    attributes[name] = self._replaced[name]
        return (attributes, *state[1:]) if isinstance(state, tuple) else attributes
