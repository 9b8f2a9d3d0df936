"""Question 2, the mechanism: one step through projections drawn at random, against the full step.

Scaled to have the mean G, the one-sided step is G A^T A and the two-sided one is (B^T B G + G A^T A) / 2. Their
variance E |step - G|^2 / |G|^2, with G (m, n):

    entries N(0, 1/r)        (n + 1) / r        two-sided: ((n + 1) / r + (m + 1) / r) / 4
    entries +-1/sqrt(r)      (n - 1) / r
    orthogonal rows          n / r - 1          A = sqrt(n / r) Q, Q Q^T = I
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from studies.cells import Cell, Results
from studies.digits import Task, pretrained, task
from studies.forgetting import NAMES
from studies.methods import Plan, runs
from studies.statistics import band
from studies.training import effective_rank, weight_names

KINDS = ("normal", "Rademacher", "orthogonal rows")
RANKS = (1, 8, 32)


def draw(kind: str, rank: int, side: int, generator: torch.Generator) -> Tensor:
    """Draw A (rank, side) with E[A^T A] = I."""
    normal = torch.randn(rank, side, generator=generator)
    if kind == "normal":
        return normal / math.sqrt(rank)
    if kind == "Rademacher":
        return normal.sign() / math.sqrt(rank)
    return torch.linalg.qr(normal.T).Q.T * math.sqrt(side / rank)


def variance(kind: str, rank: int, n: int) -> float:
    """Return the variance of the one-sided step over |G|^2."""
    return {"normal": (n + 1) / rank, "Rademacher": (n - 1) / rank, "orthogonal rows": n / rank - 1}[kind]


def gradients(seed: int, size: int = 32) -> dict[str, Tensor]:
    """Return the gradient of the new task's first ``size`` images at the pretrained model, for each Linear."""
    model = copy.deepcopy(pretrained(seed))
    split = task(seed).new_train
    loss = functional.cross_entropy(model(split.x[:size]), split.y[:size])
    names = weight_names(model)
    return dict(zip(names, torch.autograd.grad(loss, [model.get_parameter(name) for name in names]), strict=True))


def measure_variance(seed: int, draws: int) -> dict[str, Any]:
    """Measure the variance of the one-sided step on a real gradient, (192, 64), and the rank of steps."""
    G = gradients(seed)["blocks.0.qkv.weight"]
    generator = torch.Generator().manual_seed(seed)
    result: dict[str, Any] = {"shape": list(G.shape), "gradient_rank": effective_rank(G), "kinds": {}}
    for kind in KINDS:
        for rank in RANKS:
            errors, ranks = [], []
            for _ in range(draws):
                A = draw(kind, rank, G.shape[1], generator)
                step = G @ A.T @ A
                errors.append(((step - G).norm() / G.norm()).square().item())
                if len(ranks) < 20:
                    ranks.append(effective_rank(step))
            result["kinds"][f"{kind}, r={rank}"] = {
                "variance": sum(errors) / draws,
                "expected": variance(kind, rank, G.shape[1]),
                "step_rank": sum(ranks) / len(ranks),
            }
    return result


STEPS = {"full": 0, "both r=1": 1, "both r=8": 8, "A r=1": 1, "A r=8": 8}
RATES = (0.001, 0.003, 0.01, 0.03)


@torch.no_grad()
def _losses(model: torch.nn.Module, digits: Task) -> tuple[float, float]:
    new = functional.cross_entropy(model(digits.new_train.x), digits.new_train.y)
    old = functional.cross_entropy(model(digits.old_test.x), digits.old_test.y)
    return new.item(), old.item()


def one_step(seed: int, draws: int) -> dict[str, Any]:
    """Take one step from the pretrained model, of equal mean for all kinds, and read both losses.

    Returns:
        For each kind and rate, means over the draws: ``norm`` of the step over that of the full one, ``new`` and
        ``old``, the changes of the losses.
    """
    digits, G = task(seed), gradients(seed, 512)
    model = copy.deepcopy(pretrained(seed))
    start = {name: model.get_parameter(name).detach().clone() for name in G}
    before = _losses(model, digits)
    generator = torch.Generator().manual_seed(seed)
    result: dict[str, Any] = {}
    size = math.sqrt(sum(gradient.square().sum().item() for gradient in G.values()))
    for kind, rank in STEPS.items():
        for lr in RATES:
            rows = []
            for _ in range(draws if rank else 1):
                squares = 0.0
                for name, gradient in G.items():
                    step = gradient
                    if rank:
                        A = draw("normal", rank, gradient.shape[1], generator)
                        step = gradient @ A.T @ A
                    if kind.startswith("both"):
                        B = draw("normal", rank, gradient.shape[0], generator)
                        step = (B.T @ (B @ gradient) + step) / 2
                    squares += step.square().sum().item()
                    model.get_parameter(name).data = start[name] - lr * step
                after = _losses(model, digits)
                rows.append((math.sqrt(squares) / size, after[0] - before[0], after[1] - before[1]))
            means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
            result[f"{kind}, lr={lr}"] = dict(zip(("norm", "new", "old"), means, strict=True))
    return result


def average(cells: list[Any]) -> Any:
    """Return the mean of numbers at the same place of nested dictionaries."""
    if isinstance(cells[0], dict):
        return {key: average([cell[key] for cell in cells]) for key in cells[0]}
    if isinstance(cells[0], list):
        return cells[0]
    return sum(cells) / len(cells)


def steps_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the bands over seeds of what a method's steps are like, each the mean over the checkpoints of a run."""
    whole = [run["curve"] | {"rank": [run["rank"]]} for run in rows if not run.get("diverged")]
    return {
        name: band([sum(curve[name]) / len(curve[name]) for curve in whole])
        for name in ("step_rank", "old_cosine", "rank")
    }


def study(results: Results, plan: Plan) -> dict[str, Any]:
    """Answer the question."""
    draws = 500 if plan.whole else 20
    variances = results.get(
        [Cell(f"projections/variance-{seed}", measure_variance, (seed, draws)) for seed in plan.seeds]
    )
    names = [name for name in NAMES if plan.has([name])]
    few = draws // 25 + 1
    steps = results.get([Cell(f"projections/one_step-{seed}", one_step, (seed, few)) for seed in plan.seeds])
    return {
        "variance": average(variances),
        "one_step": average(steps),
        "steps": {name: steps_of(rows) for name, rows in runs(results, names, plan).items()},
    }
