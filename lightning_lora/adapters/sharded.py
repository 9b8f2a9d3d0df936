"""Adapters and weights of which every process holds a part: what is done to them as if they were whole.

All that is done here is done by all processes together, in the same order. What is whole already is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from lightning_lora.adapters import Adapter
from lightning_lora.weights import sharded as shards


@contextmanager
def gathered(adapter: Adapter) -> Iterator[Adapter]:
    """``adapter`` with whole tensors. What it is in the end, each process keeps its part of."""
    copy = adapter.whole()
    yield copy
    if copy is not adapter:
        adapter.steps, adapter.drawn_at = copy.steps, copy.drawn_at
        for name, tensor in adapter.state_dict().items():
            shards.write(tensor, copy.state_dict()[name])


def follow_step(adapter: Adapter, weight: Tensor, A: Tensor, B: Tensor) -> None:
    """:meth:`Adapter.follow` where adapter and weight may be spread; the factors before, ``A`` and ``B``, are whole.

    Where the increment of some rows can be computed alone, each process adds it to the rows that it holds. Elsewhere
    the weight is gathered too.
    """
    copy = adapter.whole()
    if not shards.is_part(weight):
        copy.follow(weight, A, B)
    elif copy.has_rows and (own := shards.rows(weight)) is not None:
        copy.follow(weight.detach().to_local(), A, B, rows=own)  # type: ignore[attr-defined]
    else:
        value = shards.whole(weight)
        copy.follow(value, A, B)
        shards.write(weight, value)
    adapter.lost = copy.lost
