"""The additive form against the product form, operation by operation, on one thread.

    python benchmarks/algebra.py --json docs/benchmarks/algebra.json

Times what a decomposition itself does: the gradients of A and B from X and dY (``gradient="merged"``), those from G
(``"projected"``), and the step of the weight. Operands are new in each round, so that they come from memory; CPU time,
medians of the ratio additive / product in the same round, with quartiles.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import environment

from lightning_lora import Adapter
from lightning_lora.adapters import Additive

SHAPES = {"a, q": (1024, 512, 512), "a, up": (1024, 512, 1408), "b, up": (512, 576, 1536), "d": (512, 2048, 2048)}
"""Name -> b rows, n inputs, m outputs."""


def operations(kind: type[Adapter], rank: int, b: int, n: int, m: int) -> dict[str, Callable[[], object]]:
    """Name -> what is timed."""
    A, B = torch.randn(rank, n), torch.randn(rank, m)
    adapter = kind(A, B)
    X, dY = (torch.randn(6, b, side) for side in (n, m))  # six, so that none is in the cache when its turn comes
    W = torch.randn(6, m, n)
    turn = iter(range(10**9))

    def thin() -> object:
        i = next(turn) % 6
        return adapter.project_thin(X[i], dY[i], A, B)

    def full() -> object:
        return adapter.project(W[next(turn) % 6], A, B)

    def step() -> object:
        return adapter.add_step(W[next(turn) % 6], *adapter.step(A, B, A + 1e-6, B + 1e-6))

    return {"gradients from X and dY": thin, "gradients from G": full, "step of the weight": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    result = {"rank": arguments.rank, "rounds": arguments.rounds, **environment(), "additive_over_product": {}}
    for name, shape in SHAPES.items():
        product, additive = (operations(kind, arguments.rank, *shape) for kind in (Adapter, Additive))
        for what in product:
            ratios = []
            for i in range(arguments.rounds + 5):
                seconds = {}
                for form, run in random.sample([("product", product[what]), ("additive", additive[what])], 2):
                    start = time.thread_time()
                    run()
                    seconds[form] = time.thread_time() - start
                if i >= 5:
                    ratios.append(seconds["additive"] / seconds["product"])
            low, middle, high = statistics.quantiles(ratios, n=4)
            result["additive_over_product"].setdefault(name, {})[what] = [low, middle, high]
            print(f"{name:6s} {shape!s:18s} {what:24s} {middle:.2f} [{low:.2f}, {high:.2f}]", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
