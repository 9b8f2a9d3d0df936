"""How the factors of an increment are laid out in PEFT's tensors.

With R (r, rows) and C (r, columns), such that the increment of a weight as it is stored is ``scale * R.T @ C``, the
layouts of PEFT are

===============================  =====================================  =====================================
the weight, as it is stored      ``lora_A``                             ``lora_B``
===============================  =====================================  =====================================
Linear (out, in), any matrix     C (r, in)                              R^T (out, r)
Conv1D of transformers (in, out) R (r, in)                              C^T (out, r)
Embedding (number, size)         R (r, number), ``lora_embedding_A``    C^T (size, r), ``lora_embedding_B``
Conv (out, in, ...)              C (r, in, ...)                         R^T (out, r, 1, ...)
stack (k, out, in)               C (k r, in)                            (out, r k): R[j, i] in column i k + j
stack (k, in, out)               R (k r, in)                            (out, r k): C[j, i] in column i k + j
===============================  =====================================  =====================================

Which of the two layouts a stack has depends on PEFT's version and on the module's ``is_transposed``; files are written
as by :data:`~lightning_lora.checkpoint.peft.config.WRITTEN_AS`. A module whose parameters are adapted by
``target_parameters`` is wrapped once for each, from the first to the last; what is inside a wrapper has ``base_layer``
in its name. A MultiheadAttention has two adapters of one rank: that of ``in_proj_weight``, and that of ``out_proj``
inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lora.checkpoint.peft.config import WRITTEN_AS, Version

CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
TRANSPOSED = ("Conv1D", "Embedding")
MODULES = ("Linear", *TRANSPOSED, *CONVOLUTIONS)
"""Layers for which PEFT has a wrapper of their own, by the names of :func:`~lightning_lora.hosts.layer_of`."""
ATTENTION = "MultiheadAttention"
PARAMETERS = ("parameter", "transposed parameter")
TWICE_UNTIL = (0, 21)
"""The last version of PEFT that is known to add the increment of a MultiheadAttention's ``out_proj`` twice, in each
forward and in each merge. Files are written and read so that the function is the same."""


def kinds(layer: str) -> tuple[str, str]:
    """Return what the names of the tensors of A and B end in."""
    return ("lora_embedding_A", "lora_embedding_B") if layer == "Embedding" else ("lora_A", "lora_B")


def encoded(layer: str, R: Tensor, C: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
    """Return the tensors of PEFT for R and C, of a weight of ``shape``, by what their names end in."""
    stacked = R.dim() == 3
    A, B = (R, C) if _rows_in_A(layer, stacked, WRITTEN_AS) else (C, R)
    if stacked:
        A, B = A.flatten(0, 1), B.permute(2, 1, 0).flatten(1)
    elif layer in CONVOLUTIONS:
        A, B = A.view(-1, *shape[1:]), B.T.reshape(shape[0], -1, *(1 for _ in shape[2:]))
    else:
        B = B.T
    end = "" if layer == "Embedding" else ".weight"
    return {f"{kind}{end}": tensor for kind, tensor in zip(kinds(layer), (A, B), strict=True)}


def decoded(
    layer: str, A: Tensor, B: Tensor, shape: Sequence[int], version: Version | None
) -> tuple[Tensor, Tensor] | None:
    """Return R and C of PEFT's tensors; None if they do not fit a weight of ``shape``."""
    stacked = layer in PARAMETERS and len(shape) == 3
    rows, columns = shape[1:] if stacked else (shape[0], math.prod(shape[1:]))
    rows_in_A = _rows_in_A(layer, stacked, version)
    if layer in CONVOLUTIONS:
        if A.dim() != len(shape) or B.dim() != len(shape) or A.shape[1:] != torch.Size(shape[1:]):
            return None
        A, B = A.flatten(1), B.flatten(1)
    if A.dim() != 2 or B.dim() != 2:
        return None
    if stacked:
        k = shape[0]
        if len(A) % k or B.shape[1] != len(A):
            return None
        A, B = A.unflatten(0, (k, -1)), B.unflatten(1, (-1, k)).permute(2, 1, 0)
        rows_in_A = rows_in_A if rows == columns else A.shape[-1] == rows  # what fits, whatever the version is
    else:
        B = B.T
    R, C = (A, B) if rows_in_A else (B, A)
    fits = R.shape[-2] == C.shape[-2] > 0 and (R.shape[-1], C.shape[-1]) == (rows, columns)
    return (R, C) if fits else None


def _rows_in_A(layer: str, stacked: bool, version: Version | None) -> bool:
    """Return whether ``lora_A`` is R, the factor of the rows, as one version of PEFT has it; files need not say."""
    if not stacked:
        return layer in TRANSPOSED
    if version is None or version < (0, 19):
        return True
    return (layer == "transposed parameter") == (version >= (0, 20))


def of_lower_rank(R: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product with no more rows than the smallest side, for ranks above it."""
    U, S, Vh = torch.linalg.svd(R.mT @ C, full_matrices=False)
    root = S.sqrt().unsqueeze(-1)
    return root * U.mT, root * Vh
