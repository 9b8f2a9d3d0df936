"""Products that what is saved depends on, whatever precision the user has chosen for those of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32, not in TF32 or bfloat16.

    For increments that go into weights and out again, their bounds, and what is carried over a draw. The settings of
    ``torch.set_float32_matmul_precision``, or of the backends, are put back.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch asks for the settings of the backends where one of them was set by itself
        with _of_backends():
            yield
        return
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _of_backends() -> Iterator[None]:
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
