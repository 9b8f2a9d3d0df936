"""What would be saved by one pass over an input that several adapted layers share: q, k, v, or gate and up.

    python benchmarks/shared_input.py --threads 1

The thin products of g layers of the same input, forward and backward, beside the same with the factors of the layers
stacked: Z of all from one product, dA of all from one, and dX of all from one of rank g r. The layers' large products
are not computed here: they are the same in both. The saving is given over their time, forward and dX, measured apart.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
from torch import Tensor

BLOCKS = {  # of the jobs (a) and (b) of step_time.py: rows, inputs, outputs of each layer
    "(a) q, k, v": (1024, 512, (512, 512, 512)),
    "(a) gate, up": (1024, 512, (1408, 1408)),
    "(b) q, k, v": (512, 576, (576, 192, 192)),
    "(b) gate, up": (512, 576, (1536, 1536)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter

    for name, (b, n, outputs) in BLOCKS.items():
        r, g = arguments.rank, len(outputs)
        inputs = [torch.randn(b, n) for _ in range(1 + 2**27 // (4 * b * n))]  # no cache holds them all
        As, dZs = torch.randn(g, r, n), torch.randn(g, r, b)
        weights = [torch.randn(m, n) for m in outputs]
        dys = [torch.randn(b, m) for m in outputs]

        def apart(x: Tensor, As: Tensor = As, dZs: Tensor = dZs, dx: Tensor = inputs[0]) -> None:
            for A in As:
                A @ x.T
            for A, dZ in zip(As, dZs, strict=True):
                dZ @ x
                dx.addmm_(dZ.T, A)

        def together(x: Tensor, As: Tensor = As, dZs: Tensor = dZs, dx: Tensor = inputs[0]) -> None:
            stacked, dZ = As.flatten(0, 1), dZs.flatten(0, 1)
            stacked @ x.T
            dZ @ x
            dx.addmm_(dZ.T, stacked)

        def large(x: Tensor, weights: list[Tensor] = weights, dys: list[Tensor] = dys) -> None:
            for weight, dy in zip(weights, dys, strict=True):
                x @ weight.T
                dy @ weight

        ways = {"apart": apart, "together": together, "large": large}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(arguments.rounds):
            x = random.choice(inputs)
            for way in random.sample(list(ways), len(ways)):
                start = clock()
                ways[way](x)
                times[way].append(1e6 * (clock() - start))
        saved = [a - t for a, t in zip(times["apart"], times["together"], strict=True)]
        low, middle, high = statistics.quantiles(saved, n=4)
        medians = {way: statistics.median(times[way]) for way in ways}
        print(f"{name:14s}", ", ".join(f"{way} {median:.0f} us" for way, median in medians.items()))
        print(f"    saved {middle:.0f} [{low:.0f}, {high:.0f}] us, {100 * middle / medians['large']:.1f} % of large")


if __name__ == "__main__":
    main()
