"""Names of modules and parameters: without those of wrappers, and with stars for numbers.

``torch.compile``, activation checkpoints and Fabric put a module into another one, which adds a name.
"""

from __future__ import annotations

import re

from torch import nn

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A part of a name that is a number, such as that of a layer."""

COMPILED, CHECKPOINTED, FABRIC = "_orig_mod", "_checkpoint_wrapped_module", ("_original_module", "_forward_module")
"""What the module inside is called by each."""


def plain_name(name: str) -> str:
    """Return ``name``, of a module or a parameter, as it is in the user's code: without the wrappers' own names."""
    return ".".join(part for part in name.split(".") if part not in (COMPILED, CHECKPOINTED, *FABRIC))


def state_key(name: str) -> str:
    """Return the key in a ``state_dict`` of what is called ``name``, without the names of checkpoints and Fabric."""
    return ".".join(part for part in name.split(".") if part not in (CHECKPOINTED, *FABRIC))


def starred(name: str) -> str:
    """Return ``name`` with a star for each part that is a number."""
    return NUMBER.sub("*", name)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that ``module`` wraps; itself if it wraps none."""
    for name in (COMPILED, CHECKPOINTED, *FABRIC):
        if (inner := module._modules.get(name)) is not None:
            return unwrapped(inner)
    return module
