"""The methods, how their rates are tuned, and the runs that all questions about training share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from studies.cells import Cell, Results
from studies.training import STEPS, Method, final_loss, run

TUNING_SEEDS = (100, 101)
"""None of the seeds that are reported."""
MIDDLE = {"AdamW": -6, "SGD": -3}
"""Where a search begins, in half decades: 0.001 and 0.032."""


def _anew(form: str, every: int, rank: int = 8) -> dict[str, Any]:
    return {"rank": rank, "gradient": "merged", "resample": form, "resample_every_n_steps": every}


HEAD = {"head": 2}
"""The rank that the additive form can have at the head, 10 x 64; given to the product for equal parameters."""

METHODS: dict[str, Method] = {
    "full": Method("AdamW"),
    "full, everything": Method("AdamW", everything=True),
    **{f"LoRA r={r}": Method("AdamW", {"rank": r}) for r in (1, 8, 32)},
    **{f"anew both k={k}": Method("AdamW", _anew("both", k)) for k in (1, 10, 100)},
    **{f"anew A k={k}": Method("AdamW", _anew("A", k)) for k in (1, 10, 100)},
    "additive r=8": Method("AdamW", {"rank": 8, "decomposition": "additive"}),
    "DoRA r=8": Method("AdamW", {"rank": 8, "decomposition": "dora"}),
    "symmetric r=8": Method("AdamW", {"rank": 8, "init": "symmetric"}),
    "SGD full": Method("SGD"),
    "SGD LoRA r=8": Method("SGD", {"rank": 8}),
    "SGD symmetric r=8": Method("SGD", {"rank": 8, "init": "symmetric"}),
    **{f"SGD anew both k={k}": Method("SGD", _anew("both", k)) for k in (1, 10, 100)},
    **{f"SGD anew A k={k}": Method("SGD", _anew("A", k)) for k in (1, 10, 100)},
    "SGD anew both k=1 r=1": Method("SGD", _anew("both", 1, rank=1)),
    "orthogonal r=8": Method("AdamW", {"rank": 8, "init": "orthogonal"}),
    "PiSSA r=8": Method("AdamW", {"rank": 8, "init": "pissa"}),
    **{f"LoRA r={r}, head 2": Method("AdamW", {"rank": r, "rank_pattern": HEAD}) for r in (8, 16)},
    **{f"additive r={r}": Method("AdamW", {"rank": r, "decomposition": "additive"}) for r in (1, 16)},
}
LOW = "full, low rate"
"""Full AdamW at a tenth of its tuned rate."""
THIRD = ("full", "LoRA r=8", "anew both k=1", "SGD full", "SGD anew both k=1")
LOWERED = {LOW: ("full", 0.1), **{f"{name}, a third": (name, 10**-0.5) for name in THIRD}}
"""A tuned method at so many times its tuned rate."""


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Args:
        seeds: Of the runs that are reported.
        steps: Of each run.
        tuning_seeds: Of the runs that choose the rate.
        widest: The most rates that a search takes.
        only: The methods that are run; None for all.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = STEPS
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    widest: int = 9
    only: tuple[str, ...] | None = None

    @property
    def whole(self) -> bool:
        """True if nothing is left out."""
        return self.only is None

    def has(self, names: Iterable[str]) -> bool:
        """True if all of the methods ``names`` are run."""
        return self.only is None or set(names) <= set(self.only)


FULL = Plan()
QUICK = Plan(
    seeds=(0, 1),
    steps=16,
    tuning_seeds=TUNING_SEEDS[:1],
    widest=3,
    only=("full", LOW, "LoRA r=1", "LoRA r=8", "anew A k=1", "additive r=1", "symmetric r=8", "SGD full"),
)


def rate(k: int) -> float:
    """Return the rate of ``k`` half decades, 10^(k/2) to two digits."""
    return float(f"{10 ** (k / 2):.2g}")


def search(loss: Callable[[float], float], middle: int, widest: int) -> dict[str, Any]:
    """Find the rate of the least loss that has worse ones on both sides.

    Three rates around the middle are tried; then one more on the side of the best, until the best is at no edge.

    Args:
        loss: Of a rate; infinite if it diverges.
        middle: Where to begin, in half decades.
        widest: The most rates that are tried.

    Returns:
        ``rates`` and ``losses``, by rising rate; ``best``, a rate; ``at_edge``, True if the search ran out.
    """
    tried = {k: loss(rate(k)) for k in (middle - 1, middle, middle + 1)}
    while len(tried) < widest:
        best = min(tried, key=lambda k: (tried[k], k))
        if min(tried) < best < max(tried):
            break
        new = min(tried) - 1 if best == min(tried) else max(tried) + 1
        tried[new] = loss(rate(new))
    best = min(tried, key=lambda k: (tried[k], k))
    return {
        "rates": [rate(k) for k in sorted(tried)],
        "losses": [tried[k] for k in sorted(tried)],
        "best": rate(best),
        "at_edge": best in (min(tried), max(tried)),
    }


def tune(name: str, plan: Plan) -> dict[str, Any]:
    """Search the rate of the method ``name`` by the mean loss on the new task's held-out part."""
    method = METHODS[name]

    def loss(lr: float) -> float:
        losses = [final_loss(method, lr, seed, plan.steps) for seed in plan.tuning_seeds]
        return sum(losses) / len(losses)

    return search(loss, MIDDLE[method.optimizer], plan.widest)


def tuned_name(name: str) -> str:
    """Return the method whose search gives the rate of the method ``name``."""
    return LOWERED[name][0] if name in LOWERED else name


def run_cell(name: str, lr: float, seed: int, plan: Plan) -> dict[str, Any]:
    """Run the method ``name``."""
    return run(METHODS[tuned_name(name)], lr, seed, plan.steps)


def file_name(method: str) -> str:
    """Return ``method`` as it is in the names of files."""
    return method.replace(", ", "_").replace(" ", "_").replace("=", "")


def tuned(results: Results, names: Sequence[str], plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the searches of the methods ``names``."""
    cells = [Cell(f"tuning/{file_name(name)}", tune, (name, plan)) for name in names]
    return dict(zip(names, results.get(cells), strict=True))


def runs(results: Results, names: Sequence[str], plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of the methods ``names`` at their tuned rates, one for each seed."""
    searches = tuned(results, list(dict.fromkeys(tuned_name(name) for name in names)), plan)
    rates = {name: searches[tuned_name(name)]["best"] for name in names}
    rates |= {name: float(f"{rates[name] * LOWERED[name][1]:.2g}") for name in names if name in LOWERED}
    cells = {
        (name, seed): Cell(f"runs/{file_name(name)}-{seed}", run_cell, (name, rates[name], seed, plan))
        for seed in plan.seeds
        for name in names
    }
    done = dict(zip(cells, results.get(list(cells.values())), strict=True))
    return {name: [done[name, seed] for seed in plan.seeds] for name in names}


def finite(values: Sequence[float | None]) -> list[float]:
    """Return ``values`` without those that are missing."""
    return [value for value in values if value is not None and math.isfinite(value)]
