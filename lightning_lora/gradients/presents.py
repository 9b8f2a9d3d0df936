"""How the memory report tells what an adapted operation would be in full fine-tuning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

F = TypeVar("F", bound=Callable[..., Any])


def presents(base: Callable[..., Any]) -> Callable[[F], F]:
    """Make a torch function of the decorated one: a ``TorchFunctionMode`` sees one call of it, and none inside it.

    Args:
        base: What full fine-tuning does in its place, with the same arguments: the forward of the class that a host
            takes the place of, or ``lambda weight, *_: weight`` for a function that reads a weight.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def overridable(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling() and has_torch_function_unary(None):  # only if there is a mode
                return handle_torch_function(overridable, (), *args, **kwargs)
            return function(*args, **kwargs)

        overridable.base = base  # type: ignore[attr-defined]
        return overridable  # type: ignore[return-value]

    return decorate
