"""Names of what torch has wrapped: ``torch.compile`` and activation checkpoints put a module into another one."""

from __future__ import annotations

from torch import nn

COMPILED, CHECKPOINTED = "_orig_mod", "_checkpoint_wrapped_module"
"""What the module inside is called by either."""


def plain_name(name: str) -> str:
    """``name``, of a module or a parameter, as it is in the user's code: without the wrappers' own names."""
    return ".".join(part for part in name.split(".") if part not in (COMPILED, CHECKPOINTED))


def state_key(name: str) -> str:
    """The key in a ``state_dict`` of what is called ``name``: torch takes only the checkpoints' names out of it."""
    return ".".join(part for part in name.split(".") if part != CHECKPOINTED)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that ``module`` wraps; itself if it wraps none."""
    for name in (COMPILED, CHECKPOINTED):
        if (inner := module._modules.get(name)) is not None:
            return unwrapped(inner)
    return module
