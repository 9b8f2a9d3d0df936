"""Embedding: a Linear whose input is one-hot, and whose weight is stored (n, m), n the size of the vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.gradients import merged
from lightning_lora.gradients.presents import presents
from lightning_lora.gradients.transforms import is_watched
from lightning_lora.hosts.host import LayerHost


class _EmbeddingHost(LayerHost):
    padding_idx: int | None

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Z, (..., r), for the indices ``x`` (...) and ``A`` (r, n)."""
        return F.embedding(x, A.T, self.padding_idx)

    def up(self, z: Tensor, B: Tensor) -> Tensor:
        """What is added to the output, (..., m), for ``B`` (r, m)."""
        return self.lora.scale * (z @ B)


class FactoredEmbeddingHost(_EmbeddingHost):
    """An embedding whose increment is computed beside it."""

    holds_increment = False

    @presents(nn.Embedding.forward)
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        A, B = (factor.to(y.dtype) for factor in self.lora.increment())
        return self.rescaled(y + self.up(self.down(input, A), B).to(y.dtype))


class MergedEmbeddingHost(_EmbeddingHost):
    """An embedding whose weight holds the increment."""

    holds_increment = True

    @presents(nn.Embedding.forward)
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return merged.tap(y, input, self) if is_watched() else y

    def up_backward(self, z: Tensor, dy: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return dy @ B.T, z.flatten(0, -2).T @ dy.flatten(0, -2)
