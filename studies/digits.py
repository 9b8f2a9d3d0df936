"""The digits: a small vision transformer that knows 0 to 4 and has to learn 5 to 9."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    raise ImportError('The studies need scikit-learn and SciPy: pip install "lightning-lora[studies]".') from error

CLASSES = 10
OLD = 5
"""Digits below it are the old task."""


class Block(nn.Module):
    """Attention and a perceptron, each on normalised input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (b, t, width) to tokens of that shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class TinyViT(nn.Module):
    """A vision transformer for 8 x 8 images: patches of 4 x 4, the mean of the tokens, ten classes."""

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Linear(16, width)
        self.positions = nn.Parameter(0.02 * torch.randn(4, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (b, 8, 8) to scores (b, 10)."""
        patches = images.unfold(1, 4, 4).unfold(2, 4, 4).flatten(3).flatten(1, 2)
        return self.head(self.norm(self.blocks(self.patches(patches) + self.positions).mean(1)))


@dataclass(frozen=True)
class Split:
    """Images (n, 8, 8) and their digits (n,)."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Task:
    """Both tasks, split by a seed of its own: 60 % to train, 40 % held out."""

    old_train: Split
    old_test: Split
    new_train: Split
    new_test: Split


@functools.cache
def task(seed: int) -> Task:
    """Split the digits anew."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 8 - 1, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    splits = []
    for chosen in (order[y[order] < OLD], order[y[order] >= OLD]):
        cut = int(0.6 * len(chosen))
        splits += [Split(x[part], y[part]) for part in (chosen[:cut], chosen[cut:])]
    return Task(*splits)


def batches(split: Split, size: int, steps: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return ``steps`` batches, epoch after epoch in a new order; every method of a seed gets the same."""
    generator = torch.Generator().manual_seed(seed)
    result: list[tuple[Tensor, Tensor]] = []
    while len(result) < steps:
        order = torch.randperm(len(split.x), generator=generator)
        result += [(split.x[part], split.y[part]) for part in order.split(size) if len(part) == size]
    return result[:steps]


@functools.cache
def pretrained(seed: int, steps: int = 300) -> TinyViT:
    """Train on the old task; the caller must not change what it gets."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyViT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for x, y in batches(task(seed).old_train, 64, steps, seed):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model
