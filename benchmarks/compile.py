"""Time of one compiled training step over the same step uncompiled, for full fine-tuning, PEFT and ours.

    python benchmarks/compile.py --rounds 15 --json docs/benchmarks/compile.json

The model is Llama-like, of width 256, 4 layers (`--layers`) and 4 x 128 tokens, float32. Each round runs one step of
every method, compiled by torch's default backend and not, in an order drawn anew. Reported are quartiles of ratios in
the same round, what the first compiled step takes, graphs and graph breaks, and how many graphs were made after the
first steps.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from common import METHODS, CausalLMJob, environment, llama_like, make_model, make_step, measure
from torch._dynamo.utils import counters

COMPARED = ("full", "peft", "factored", "merged", "projected")


def small(layers: int) -> CausalLMJob:
    return llama_like(256, 704, layers, 4096, batch=4, key_value_heads=4)


def tiny() -> CausalLMJob:
    return llama_like(64, 96, 1, 128, batch=1, key_value_heads=1)


def graphs_and_breaks() -> tuple[int, int]:
    """How many there have been in this process."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(COMPARED))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    random.seed(0)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # all methods compile the same functions of the model
    job = tiny() if arguments.quick else small(arguments.layers)
    steps, first = {}, {}
    for method in arguments.methods:
        before = graphs_and_breaks()
        steps[method] = make_step(job, make_model(job, method, arguments.rank))
        compiled = f"{method}, compiled"
        steps[compiled] = make_step(job, torch.compile(make_model(job, method, arguments.rank)))
        start = time.perf_counter()
        steps[compiled]()
        seconds = time.perf_counter() - start
        graphs, breaks = (now - then for now, then in zip(graphs_and_breaks(), before, strict=True))
        first[method] = {"seconds": seconds, "graphs": graphs, "graph_breaks": breaks}
    before = graphs_and_breaks()
    times = measure(steps, arguments.rounds)
    again = graphs_and_breaks()[0] - before[0]

    result = {
        "rank": arguments.rank,
        "rounds": arguments.rounds,
        "layers": arguments.layers,
        "quick": arguments.quick,
        **environment(),
        "median_seconds": {name: statistics.median(values) for name, values in times.items()},
        "first": first,
        "graphs_after_the_first_steps": again,
    }
    for name, over in (("over_eager", None), ("over_full_compiled", "full, compiled")):
        result[name] = {
            method: statistics.quantiles(
                (a / b for a, b in zip(times[f"{method}, compiled"], times[over or method], strict=True)), n=4
            )
            for method in arguments.methods
            if over in (None, *times)
        }
    print(
        "| method | compiled over uncompiled | over full fine-tuning, compiled | ms | first step, s | graphs, breaks |"
    )
    print("|---|---|---|---|---|---|")
    for method, made in first.items():
        quartiles = [result[name].get(method, [float("nan")] * 3) for name in ("over_eager", "over_full_compiled")]
        cells = [f"{middle:.2f} [{low:.2f}, {high:.2f}]" for low, middle, high in quartiles]
        cells.append(f"{1e3 * result['median_seconds'][f'{method}, compiled']:.0f}")
        cells.append(f"{made['seconds']:.0f}")
        cells.append(f"{made['graphs']}, {made['graph_breaks']}")
        print(f"| {method} | {' | '.join(cells)} |")
    print(f"{again} graphs were made after the first steps")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
