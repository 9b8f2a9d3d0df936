"""Treats ``lightning.pytorch`` and ``pytorch_lightning`` alike: two packages with the same classes."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

from lightning.pytorch.callbacks import Callback

PREFIXES = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}

WEIGHT_AVERAGING: tuple[type[Callback], ...] = ()
"""Lightning's ``WeightAveraging``, which comes with its version 2.6."""
with contextlib.suppress(ImportError):
    from lightning.pytorch.callbacks import WeightAveraging

    WEIGHT_AVERAGING = (WeightAveraging,)

OTHER = "pytorch_lightning.callbacks.callback"
"""Where the base class of callbacks is under the other name. Importing it has side effects: it redirects Lightning's
log messages to the logger of that name, so it is for the user to import."""

Class = TypeVar("Class", bound=type)


def for_both_namespaces(kind: Class) -> Class:
    """Make ``kind``, a callback, one of ``pytorch_lightning`` too, as soon as that package is imported.

    Its Trainer, its command line and users' type checks ask for a subclass of their own ``Callback``.
    """
    if OTHER in sys.modules:
        kind.__bases__ = (*kind.__bases__, sys.modules[OTHER].Callback)
    else:
        sys.meta_path.insert(0, _WhenImported(kind))
    return kind


class _WhenImported(MetaPathFinder):
    """Adds the other ``Callback`` to the bases of ``kind`` right after its module has been imported."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Find the module as Python does, and have its loader tell."""
        if name != OTHER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader, execute = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._kind.__bases__ = (*self._kind.__bases__, module.Callback)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _qualified(kind: type) -> str:
    root, dot, rest = kind.__module__.partition(".")
    return f"{PREFIXES.get(root, root)}{dot}{rest}:{kind.__qualname__}"


def is_a(value: Any, *kinds: type) -> bool:
    """Return whether ``value`` is an instance of one of ``kinds``, Lightning's classes, under either package's name."""
    wanted = {_qualified(kind) for kind in kinds}
    return any(_qualified(kind) in wanted for kind in type(value).__mro__)
