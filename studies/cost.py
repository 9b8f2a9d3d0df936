"""Question 5: the multiplications and additions of each way to adapt one Linear, counted.

A Linear of n inputs and m outputs on b rows, whose input needs a gradient too. Twice the multiplications:

    full               6 b n m                        Y, dX and dW
    eq. lora-1         6 b n m + 6 r n m              the same, and AB, G B^T and A^T G
    eq. lora-2         4 b n m + 6 b r (n + m)        Y and dX, and Z, ZB; dZ; dA, dB and dX through A
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from lightning_lora import attach, inject
from studies.cells import Cell, Results
from studies.methods import Plan

SHAPES = ((512, 512, 512), (256, 768, 3072), (64, 2048, 2048))
"""b, n, m."""


class Formed(nn.Module):
    """Y = X (W0 + AB), eq. lora-1, in torch's layout."""

    def __init__(self, n: int, m: int, rank: int) -> None:
        super().__init__()
        self.W0 = torch.randn(m, n)
        self.A, self.B = nn.Parameter(torch.randn(rank, n)), nn.Parameter(torch.zeros(rank, m))

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, n) to (b, m)."""
        return functional.linear(x, self.W0 + self.B.T @ self.A)


class Thin(Formed):
    """Y = X W0 + Z B, eq. lora-2."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, n) to (b, m)."""
        return functional.linear(x, self.W0) + (x @ self.A.T) @ self.B


def _adapted(n: int, m: int, rank: int, **options: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(n, m, bias=False))
    inject(model, rank=rank, target_modules=["0"], **options)
    return model


ANEW = {"gradient": "merged", "resample_every_n_steps": 1, "resample_moments": "reset"}
WAYS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "full": lambda n, m, r: nn.Linear(n, m, bias=False),
    "lora-1": Formed,
    "lora-2": Thin,
    "factored": lambda n, m, r: _adapted(n, m, r),
    "merged": lambda n, m, r: _adapted(n, m, r, gradient="merged"),
    "projected": lambda n, m, r: _adapted(n, m, r, gradient="projected"),
    "anew both k=1": lambda n, m, r: _adapted(n, m, r, resample="both", **ANEW),
    "anew A k=1": lambda n, m, r: _adapted(n, m, r, resample="A", **ANEW),
    "additive merged": lambda n, m, r: _adapted(n, m, r, gradient="merged", decomposition="additive"),
}


def _product(_: Any, left: list[int], right: list[int], **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


IN_PLACE: dict[Any, Any] = {torch.ops.aten.addmm_: _product}
"""What torch's counter does not know, and the library does."""


def formula(way: str, b: int, n: int, m: int, rank: int) -> int:
    """Return what a forward and a backward take."""
    return {
        "full": 6 * b * n * m,
        "lora-1": 6 * b * n * m + 6 * rank * n * m,
        "lora-2": 4 * b * n * m + 6 * b * rank * (n + m),
    }[way]


def count(way: str, b: int, n: int, m: int, rank: int) -> dict[str, int]:
    """Count a forward, a backward and a step of SGD.

    Returns:
        ``pass``, of forward and backward, and ``step``, what the step multiplies: the followed weight.
    """
    model = WAYS[way](n, m, rank)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if way not in ("full", "lora-1", "lora-2"):
        attach(model, optimizer)
    x = torch.randn(b, n, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as passes:
        model(x).sum().backward()
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as steps:
        optimizer.step()
    return {"pass": passes.get_total_flops(), "step": steps.get_total_flops()}


def turn(b: int, n: int, m: int) -> dict[str, float | None]:
    """Return the ranks from which on the orders of cost turn.

    ``full``: from this rank on eq. lora-2 takes more than full fine-tuning. ``formed``: from this rank on it takes more
    than eq. lora-1; None if it never does.
    """
    wide = b * (n + m) - n * m
    return {"full": n * m / (3 * (n + m)), "formed": b * n * m / (3 * wide) if wide > 0 else None}


def counts(b: int, n: int, m: int, ranks: tuple[int, ...]) -> dict[str, Any]:
    """Count every way at every rank, on the shape b, n, m."""
    table = {way: {str(r): count(way, b, n, m, r) for r in ranks} for way in WAYS}
    return {"b": b, "n": n, "m": m, "ranks": list(ranks), "turn": turn(b, n, m), "counts": table}


def study(results: Results, plan: Plan) -> dict[str, Any]:
    """Answer the question."""
    shapes, ranks = (SHAPES, (1, 8, 64)) if plan.whole else (((64, 64, 64),), (1, 8))
    names = [f"cost/b{b}_n{n}_m{m}" for b, n, m in shapes]
    return {
        "shapes": results.get([Cell(name, counts, (*shape, ranks)) for name, shape in zip(names, shapes, strict=True)])
    }
