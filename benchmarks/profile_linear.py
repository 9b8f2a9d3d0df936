"""One adapted Linear against a frozen one: what the thin products cost, each alone and all together.

    python benchmarks/profile_linear.py --threads 1

Each product is timed with its large operand hot (the same one each time) and cold (the next of so many that none is
left in a cache of the size given), and beside them the layer's forward and backward, paired with those of the frozen
layer.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import lightning_lora

SHAPES = ((512, 512), (512, 1408), (1408, 512))
"""Inputs and outputs of the layers of the job (a) of ``step_time.py``."""


def products(b: int, n: int, m: int, r: int) -> dict[str, tuple[Callable[[Tensor], Tensor], int, int]]:
    """Name -> product of one large operand, its columns, and how often it passes through memory."""
    A, B, z = torch.randn(r, n), torch.randn(r, m), torch.randn(r, b)
    return {
        "Z = A X^T": (lambda x: A @ x.T, n, 1),
        "Y = Z^T B": (lambda _: z.T @ B, m, 1),
        "dZ = B dY^T": (lambda dy: B @ dy.T, m, 1),
        "dB = Z dY": (lambda dy: z @ dy, m, 1),
        "dA = dZ X": (lambda x: z @ x, n, 1),
        "dX = dZ^T A": (lambda _: z.T @ A, n, 1),
        "one pass: sum over rows": (lambda x: x.sum(0), n, 1),
    }


def microseconds(function: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    function()
    return 1e6 * (clock() - start)


def print_products(b: int, n: int, m: int, r: int, rounds: int, cache: int, clock: Callable[[], float]) -> None:
    for name, (product, columns, passes) in products(b, n, m, r).items():
        large = [torch.randn(b, columns) for _ in range(1 + cache // (4 * b * columns))]
        line = f"  {name:24s}"
        for operands in (large[:1], large):
            turn = itertools.islice(itertools.cycle(operands), rounds)
            middle = statistics.median(microseconds(functools.partial(product, x), clock) for x in turn)
            megabytes, gigaflops = 4e-6 * b * columns * passes, 2e-9 * b * columns * r
            line += f" {middle:6.0f} us {megabytes / middle * 1e3:6.1f} GB/s {gigaflops / middle * 1e6:6.1f} GFLOP/s |"
        print(line)


def layers(n: int, m: int, r: int) -> dict[str, nn.Module]:
    """A frozen Linear, and the same with an adapter of each kind; twice frozen, to show the noise."""
    found = {"frozen": nn.Sequential(nn.Linear(n, m, bias=False)).requires_grad_(False)}
    found["frozen again"] = nn.Sequential(nn.Linear(n, m, bias=False)).requires_grad_(False)
    for gradient in ("factored", "merged"):
        found[gradient] = nn.Sequential(nn.Linear(n, m, bias=False))
        lightning_lora.inject(found[gradient], rank=r, gradient=gradient)
    return found


def print_layers(b: int, n: int, m: int, r: int, rounds: int, clock: Callable[[], float]) -> None:
    dy, kinds = torch.randn(b, m), layers(n, m, r)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name in random.sample(list(kinds), len(kinds)):
            x, y = torch.randn(b, n, requires_grad=True), []
            forward = microseconds(lambda: y.append(kinds[name](x)), clock)  # noqa: B023
            times[name].append((forward, microseconds(lambda: y[0].backward(dy), clock)))  # noqa: B023
            kinds[name].zero_grad()
    for name in list(kinds)[1:]:
        line = f"  {name:24s}"
        for half in (0, 1):
            pairs = zip(times[name], times["frozen"], strict=True)
            low, middle, high = statistics.quantiles((a[half] - f[half] for a, f in pairs), n=4)
            floor = statistics.median(f[half] for f in times["frozen"])
            line += f" {'backward' if half else 'forward'} {floor:6.0f} {middle:+6.0f} [{low:+.0f}, {high:+.0f}] us |"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--cache", type=int, default=128, help="MiB that the operands of the cold products exceed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()

    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    b, r, rounds = arguments.rows, arguments.rank, arguments.rounds
    clock = time.process_time if arguments.threads == 1 else time.perf_counter  # other work on the machine counts less
    for n, m in SHAPES:
        print(f"{n} -> {m}, {b} rows, rank {r}, {arguments.threads} threads")
        print(f"  {'':24s} {'hot':37s} | cold")
        print_products(b, n, m, r, rounds, arguments.cache * 2**20, clock)
        print_layers(b, n, m, r, rounds, clock)


if __name__ == "__main__":
    main()
