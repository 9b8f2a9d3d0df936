"""The exception that this package raises, and its warnings."""

from __future__ import annotations

import warnings

import torch.distributed as dist


class LoRAError(ValueError):
    """A module, an option, a Trainer or a file that cannot be used as it is; the message says what to do instead."""


def warn(message: str, stacklevel: int = 3) -> None:
    """Warn with ``message``, on the process of rank 0 alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:
        warnings.warn(message, stacklevel=stacklevel)
