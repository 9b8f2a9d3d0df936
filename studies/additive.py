"""Question 3: the additive decomposition against the product, with the same number of parameters.

The nearest product of rank r to a target T (m, n) is its truncated singular value decomposition (Eckart and Young).
The additive form A[i mod r, j] + B[j mod r, i] splits T into r^2 blocks, the rows i with i mod r = p by the columns j
with j mod r = q, each of the form a_j + b_i. The nearest such block is the mean of its row plus that of its column
minus that of all: a projection on r (m + n) - r^2 dimensions. So of a target without structure it takes the share

    (r (m + n) - r^2) / (m n)

in the mean. The products of rank r have as many dimensions, r (m + n) - r^2, but not the same for every target.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from studies.cells import Cell, Results
from studies.digits import batches, pretrained, task
from studies.methods import METHODS, Plan, file_name, runs, tuned
from studies.statistics import band, holm, paired
from studies.training import BATCH, Adaptation

RANKS = (1, 2, 4, 8, 16)


def nearest_additive(target: Tensor, rank: int) -> Tensor:
    """Return the additive increment of ``rank`` nearest to ``target`` (m, n); ``rank`` divides both."""
    m, n = target.shape
    blocks = target.reshape(m // rank, rank, n // rank, rank)  # entry i = i' r + p, j = j' r + q
    rows, columns = blocks.mean(2, keepdim=True), blocks.mean(0, keepdim=True)
    return (rows + columns - rows.mean(0, keepdim=True)).expand_as(blocks).reshape(m, n)


def left_by_product(target: Tensor, rank: int) -> float:
    """Return the least |T - B^T A|^2 / |T|^2 at ``rank``."""
    squares = torch.linalg.svdvals(target).square()
    return (squares[rank:].sum() / squares.sum()).item()


def left_by_additive(target: Tensor, rank: int) -> float:
    """Return the least |T - increment|^2 / |T|^2 of the additive form at ``rank``."""
    return ((target - nearest_additive(target, rank)).square().sum() / target.square().sum()).item()


def left(target: Tensor) -> dict[str, list[float]]:
    """Return what either form leaves of ``target``, for each of :data:`RANKS`."""
    return {
        "product": [left_by_product(target, r) for r in RANKS],
        "additive": [left_by_additive(target, r) for r in RANKS],
    }


def fit_random(m: int, n: int, draws: int) -> dict[str, Any]:
    """Fit targets of independent normal entries, and those plus a part a_i + b_j of a given share of the square.

    Returns:
        ``random``: means of :func:`left` with the expected value of the additive one; ``wins``: for each rank the least
        share, of 0, 0.02, ... 1, at which the additive form of that rank leaves less than the product, in the mean.
    """
    generator = torch.Generator().manual_seed(0)
    fits = [left(torch.randn(m, n, generator=generator, dtype=torch.float64)) for _ in range(draws)]
    random = {kind: torch.tensor([fit[kind] for fit in fits]).mean(0).tolist() for kind in ("product", "additive")}
    random["additive_expected"] = [1 - (r * (m + n) - r * r) / (m * n) for r in RANKS]
    noise = torch.randn(m, n, generator=generator, dtype=torch.float64)
    noise = noise / noise.norm()
    sums = torch.randn(m, 1, generator=generator, dtype=torch.float64) + torch.randn(
        1, n, generator=generator, dtype=torch.float64
    )
    sums = sums / sums.norm()
    wins: dict[str, float | None] = {}
    for i, r in enumerate(RANKS):
        shares = [share / 50 for share in range(51)]
        fits = [left(share**0.5 * sums + (1 - share) ** 0.5 * noise) for share in shares]
        wins[f"r={r}"] = next(
            (s for s, f in zip(shares, fits, strict=True) if f["additive"][i] < f["product"][i]), None
        )
    return {"shape": [m, n], "random": random, "wins": wins}


def fit_increments(method: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Fit the increments W - W0 that the method ``method`` makes of the blocks' Linears.

    Returns:
        For each of :data:`RANKS`, of all these weights together, what is left by either form; ``wins``, in how many
        of the weights the additive form leaves less; ``weights``, their number.
    """
    adaptation = Adaptation(pretrained(seed), METHODS[method], lr, seed)
    for x, y in batches(task(seed).new_train, BATCH, steps, seed):
        adaptation.backward(x, y)
        adaptation.optimizer.step()
    moved = dict(zip(adaptation.names, adaptation.moved(), strict=True))
    increments = [delta.double() for name, delta in moved.items() if name.startswith("blocks")]
    total = sum(delta.square().sum().item() for delta in increments)
    shares = [delta.square().sum().item() / total for delta in increments]
    fits = [left(delta) for delta in increments]
    together = {
        kind: [sum(s * f[kind][i] for s, f in zip(shares, fits, strict=True)) for i in range(len(RANKS))]
        for kind in ("product", "additive")
    }
    wins = [sum(f["additive"][i] < f["product"][i] for f in fits) for i in range(len(RANKS))]
    return {**together, "wins": wins, "weights": len(increments)}


PAIRS = (
    ("additive r=1", "LoRA r=1"),
    ("additive r=8", "LoRA r=8, head 2"),
    ("additive r=16", "LoRA r=16, head 2"),
)
"""Of equal numbers of parameters: the additive form has rank 2 at most at the head, 10 x 64, and so has the product."""
TARGETS = ("full", "SGD full")


def study(results: Results, plan: Plan) -> dict[str, Any]:
    """Answer the question."""
    draws = 50 if plan.whole else 2
    shapes = ((64, 64), (192, 64))
    random = results.get([Cell(f"additive/random-{m}x{n}", fit_random, (m, n, draws)) for m, n in shapes])
    rates = {name: search["best"] for name, search in tuned(results, TARGETS, plan).items()}
    real = {}
    for name in rates:
        cells = [
            Cell(f"additive/{file_name(name)}-{seed}", fit_increments, (name, rates[name], seed, plan.steps))
            for seed in plan.seeds
        ]
        fits = results.get(cells)
        real[name] = {
            kind: [band([fit[kind][i] for fit in fits]) for i in range(len(RANKS))] for kind in ("product", "additive")
        } | {"wins": sum(sum(fit["wins"]) for fit in fits), "of": sum(fit["weights"] * len(RANKS) for fit in fits)}
    pairs = [pair for pair in PAIRS if plan.has(pair)]
    data = runs(results, [name for pair in pairs for name in pair], plan)
    trained = []
    for ours, theirs in pairs:
        losses = [[run["curve"]["new_loss"][-1] for run in data[name]] for name in (ours, theirs)]
        accuracies = [band([run["curve"]["new"][-1] for run in data[name]]) for name in (ours, theirs)]
        trained.append(
            {
                "ours": ours,
                "theirs": theirs,
                "parameters": [data[name][0]["trained"] for name in (ours, theirs)],
                "losses": [band(column) for column in losses],
                "new": accuracies,
                "difference": paired(*losses),
            }
        )
    for entry, p in zip(trained, holm([entry["difference"]["p"] for entry in trained]), strict=True):
        entry["difference"]["p_holm"] = p
    return {"ranks": list(RANKS), "random": random, "real": real, "trained": trained}
