"""Embedding: a Linear whose input is one-hot, and whose weight is stored (n, m), n the size of the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.gradients import merged
from lightning_lora.hosts.host import LayerHost


class _EmbeddingHost(LayerHost):
    padding_idx: int | None

    def increment(self, indices: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """What ``A`` (r, n) and ``B`` (r, m) add to the output: (..., m) for ``indices`` (...)."""
        return self.lora.scale * (F.embedding(indices, A.T, self.padding_idx) @ B)


class FactoredEmbeddingHost(_EmbeddingHost):
    """An embedding whose increment is computed beside it."""

    holds_increment = False

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y + self.increment(input, self.lora.A.to(y.dtype), self.lora.B.to(y.dtype)).to(y.dtype)


class MergedEmbeddingHost(_EmbeddingHost):
    """An embedding whose weight holds the increment."""

    holds_increment = True

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return merged.tap(y, input, self.lora, self.increment) if torch.is_grad_enabled() else y
