"""The exception that this package raises, and its warnings."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch.distributed as dist


class LoRAError(ValueError):
    """A module, an option, a Trainer or a file that cannot be used as it is; the message says what to do instead."""


def warn(message: str, stacklevel: int = 3) -> None:
    """Warn with ``message``, on the process of rank 0 alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:
        warnings.warn(message, stacklevel=stacklevel)


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return ``names`` for a message: some of them, and how many more there are."""
    names = list(names)
    shown = ", ".join(map(repr, names[:most])) or "nothing"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
