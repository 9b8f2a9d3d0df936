"""Question 1: who forgets least, at equal performance on the new task; and whether distance moved explains it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lightning_lora.metrics import forgetting
from studies.cells import Results
from studies.methods import LOW, LOWERED, METHODS, Plan, finite, runs, tuned
from studies.statistics import at_level, band, dummies, explained, holm, paired, spearman

NAMES = [*list(METHODS)[: list(METHODS).index("orthogonal r=8")], *LOWERED]
LEVELS = (0.5, 0.8, 0.9)
"""Accuracies on the new task at which methods are compared."""
LEVEL = 0.8
"""That of the tests. Chosen, as the measure of forgetting was, on a seed of the tuning."""
GRID = tuple(level / 20 for level in range(1, 20))


def reference(name: str) -> str:
    """Return the full fine-tuning of the same optimizer."""
    return "SGD full" if name.startswith("SGD") else "full"


PAIRS = [
    *[(name, reference(name)) for name in NAMES if name not in (reference(name), *LOWERED)],
    ("SGD full", "full"),
    *[(f"{prefix}anew {form} k=1", f"{prefix}LoRA r=8") for prefix in ("", "SGD ") for form in ("both", "A")],
    (LOW, "full"),
    ("full, a third", "full"),
    ("SGD full, a third", "SGD full"),
    ("LoRA r=8, a third", "full, a third"),
    ("anew both k=1, a third", "full, a third"),
    ("SGD anew both k=1, a third", "SGD full, a third"),
]
"""A method, and what it is compared with on the same seeds."""


def kept(run: dict[str, Any], level: float, value: str = "old_of_five") -> float | None:
    """Return ``value`` where the accuracy on the new task first reaches ``level``; None if it never does."""
    if run.get("diverged"):
        return None
    return at_level(run["curve"]["new"], run["curve"][value], level)


def bands(rows: Sequence[dict[str, Any]], value: str, levels: Sequence[float]) -> dict[str, Any]:
    """Return the band over the seeds of ``value`` at each of ``levels``, where every seed reaches it."""
    result = {}
    for level in levels:
        values = finite([kept(run, level, value) for run in rows])
        if len(values) == len(rows):
            result[f"{level:g}"] = band(values)
    return result


def lost(run: dict[str, Any]) -> float:
    """Return the forgetting of a run at its end, of the accuracy among the old classes, in the metric's own form."""
    old, new = run["curve"]["old_of_five"], run["curve"]["new"]
    return forgetting(torch.tensor([[old[0], new[0]], [old[-1], new[-1]]], dtype=torch.float64)).item()


def describe(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what is said of one method."""
    whole = [run for run in rows if not run.get("diverged")]
    last = {name: band([run["curve"][name][-1] for run in whole]) for name in ("new", "old", "old_of_five")}
    return {
        "lr": rows[0]["lr"],
        "trained": rows[0]["trained"],
        "diverged": len(rows) - len(whole),
        "last": last,
        "forgetting": band([lost(run) for run in whole]),
        "kept": bands(rows, "old_of_five", LEVELS),
        "kept_of_ten": bands(rows, "old", LEVELS),
        "distance": bands(rows, "distance", LEVELS),
        "steps": bands(rows, "step", LEVELS),
        "curve": bands(rows, "old_of_five", GRID),
    }


def compare(data: dict[str, list[dict[str, Any]]], level: float) -> list[dict[str, Any]]:
    """Test :data:`PAIRS` on what is kept at ``level``, over the seeds in which both reach it."""
    tests = []
    for ours, theirs in [pair for pair in PAIRS if set(pair) <= set(data)]:
        values = [(kept(a, level), kept(b, level)) for a, b in zip(data[ours], data[theirs], strict=True)]
        both = [(a, b) for a, b in values if a is not None and b is not None]
        if len(both) >= 2:
            tests.append({"ours": ours, "theirs": theirs, **paired(*zip(*both, strict=True))})
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p
    return tests


def by_distance(data: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Ask how much of the old task's loss is explained by the distance, by the method, and by both.

    All checkpoints but the first of all runs that did not diverge are points. The logarithm of the distance and the
    logarithm of the loss, among the old classes, are taken.
    """
    x, y, labels = [], [], []
    for name, rows in data.items():
        for run in rows:
            curve = run.get("curve", {"distance": [], "old_of_five_loss": []})
            for distance, loss in list(zip(curve["distance"], curve["old_of_five_loss"], strict=True))[1:]:
                if distance > 0 and loss is not None and loss > 0:
                    x.append(math.log(distance))
                    y.append(math.log(loss))
                    labels.append(name)
    means = {}
    for name, rows in data.items():
        values = [(kept(run, LEVEL, "distance"), kept(run, LEVEL)) for run in rows]
        if all(distance is not None for distance, _ in values):
            means[name] = [sum(column) / len(values) for column in zip(*values, strict=True)]
    return {
        "points": len(x),
        "spearman": spearman(x, y),
        "explained_by_distance": explained(y, x),
        "explained_by_method": explained(y, *dummies(labels)),
        "explained_by_both": explained(y, x, *dummies(labels)),
        "methods_at_level": len(means),
        "spearman_at_level": spearman(*zip(*means.values(), strict=True)) if len(means) > 2 else None,
    }


def study(results: Results, plan: Plan) -> dict[str, Any]:
    """Answer the question."""
    names = [name for name in NAMES if plan.has([name])]
    data = runs(results, names, plan)
    start = [rows["curve"]["old_of_five"][0] for rows in data["full"]]
    return {
        "seeds": len(plan.seeds),
        "start": band(start),
        "searches": tuned(results, [name for name in names if name not in LOWERED], plan),
        "methods": {name: describe(rows) for name, rows in data.items()},
        "tests": compare(data, LEVEL),
        "distance": by_distance(data),
    }
