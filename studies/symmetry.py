"""Question 4: where A and B start, and the size of the term that the article neglects.

A step that takes A to A + dA and B to B + dB takes s B^T A by

    s (dB^T A + B^T dA) + s dB^T dA

For SGD, dA = -eta s B G and dB = -eta s A G^T, so that the first part is of order eta and the second of eta^2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_lora import adapters
from studies.cells import Cell, Results
from studies.digits import batches, pretrained, task
from studies.methods import Plan, runs
from studies.statistics import band, holm, paired
from studies.training import BATCH, CHECKPOINTS, Adaptation, Method, norm

STARTS = ("zero", "symmetric", "orthogonal", "pissa")
RANKS = (2, 8, 32)
RATES = {"SGD": (0.01, 0.1, 1.0), "AdamW": (0.00032, 0.0032, 0.032)}


def second_order(optimizer: str, init: str, rank: int, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train, and read both parts of the steps that follow the checkpoints.

    Returns:
        ``step``; ``first`` and ``second``, the norms of both parts over all weights; ``new_loss``, of the batch.
    """
    adaptation = Adaptation(pretrained(seed), Method(optimizer, {"rank": rank, "init": init}), lr, seed)
    result: dict[str, list[float]] = {"step": [], "first": [], "second": [], "new_loss": []}
    for step, (x, y) in enumerate(batches(task(seed).new_train, BATCH, steps, seed)):
        read = step in CHECKPOINTS
        before = [(a.A.detach().clone(), a.B.detach().clone()) for a in adapters(adaptation.model).values()]
        loss = adaptation.backward(x, y).item()
        adaptation.optimizer.step()
        if not math.isfinite(loss):
            return {**result, "diverged": True}
        if read:
            first, second = parts(adaptation, before)
            values = {"step": step, "first": norm(first), "second": norm(second), "new_loss": loss}
            for name, value in values.items():
                result[name].append(value)
    return result


@torch.no_grad()
def parts(adaptation: Adaptation, before: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Return both parts (m, n) of the step from ``before``, A and B of each adapter, to what these are now."""
    first, second = [], []
    for (A, B), adapter in zip(before, adapters(adaptation.model).values(), strict=True):
        dA, dB = adapter.A - A, adapter.B - B
        first.append(adapter.scale * (dB.T @ A + B.T @ dA))
        second.append(adapter.scale * (dB.T @ dA))
    return first, second


PAIRS = (
    ("symmetric r=8", "LoRA r=8"),
    ("orthogonal r=8", "LoRA r=8"),
    ("PiSSA r=8", "LoRA r=8"),
    ("SGD symmetric r=8", "SGD LoRA r=8"),
)
READ = ("new_loss", "new", "old_of_five")


def ratios(cell: dict[str, Any]) -> dict[str, float | None]:
    """Return the second part over the first at the first step, in the mean, and at its largest."""
    pairs = zip(cell["first"], cell["second"], strict=True)
    values = [second / first if first else None for first, second in pairs if first is not None and second is not None]
    known = [value for value in values if value is not None]
    if cell.get("diverged") or not known:
        return {"first": None, "mean": None, "largest": None}
    return {"first": values[0], "mean": sum(known) / len(known), "largest": max(known)}


def study(results: Results, plan: Plan) -> dict[str, Any]:
    """Answer the question."""
    cells = {
        (optimizer, init, rank, lr): Cell(
            f"second_order/{optimizer}_{init}_r{rank}_lr{lr:g}",
            second_order,
            (optimizer, init, rank, lr, plan.seeds[0], plan.steps // 2),
        )
        for optimizer in RATES
        for init in (STARTS if plan.whole else STARTS[:2])
        for rank in (RANKS if plan.whole else RANKS[1:2])
        for lr in RATES[optimizer]
    }
    read = dict(zip(cells, results.get(list(cells.values())), strict=True))
    orders = [{"optimizer": o, "init": i, "rank": r, "lr": lr, **ratios(cell)} for (o, i, r, lr), cell in read.items()]
    pairs = [pair for pair in PAIRS if plan.has(pair)]
    data = runs(results, list(dict.fromkeys(name for pair in pairs for name in pair)), plan)
    starts = {
        name: {value: band([run["curve"][value][-1] for run in rows]) for value in READ} | {"lr": rows[0]["lr"]}
        for name, rows in data.items()
    }
    tests = [
        {
            "ours": ours,
            "theirs": theirs,
            **paired(*[[r["curve"]["new_loss"][-1] for r in data[n]] for n in (ours, theirs)]),
        }
        for ours, theirs in pairs
    ]
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p
    return {"orders": orders, "starts": starts, "tests": tests}
