"""How the time of one training step grows with the rank, the tokens in a step, and the layers of a Llama-like model.

    python benchmarks/growth.py --json growth.json

One of the three varies while the others stay: rank 8, 1024 tokens, 4 layers, width 256. For each value all methods are
interleaved in one process, as in ``step_time.py``, and what is printed is the median over rounds of the ratio to
``full`` in the same round, with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from common import environment, llama_like, make_model, make_step, measure, summarize

METHODS = ("full", "peft", "factored", "merged", "projected", "floor")
FIXED = {"rank": 8, "tokens": 1024, "layers": 4}
GROWTH = {
    "rank": (1, 4, 16, 64, 256),
    "tokens": (128, 512, 2048, 8192),
    "layers": (1, 2, 4, 8, 16, 24),
}


def times(rank: int, tokens: int, layers: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each method's steps on a model of width 256 and sequences of 128 tokens."""
    job = llama_like(256, 704, layers, 1024, batch=tokens // 128, key_value_heads=4)
    return measure({method: make_step(job, make_model(job, method, rank)) for method in METHODS}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=GROWTH)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    random.seed(0)
    torch.manual_seed(0)
    result: dict[str, Any] = {"fixed": FIXED, "rounds": arguments.rounds, **environment()}
    for what in [arguments.only] if arguments.only else GROWTH:
        result[what] = {}
        for value in GROWTH[what]:
            summary = summarize(times(**{**FIXED, what: value}, rounds=arguments.rounds))
            result[what][value] = summary
            print(f"{what} = {value}: full {1000 * summary['median_seconds']['full']:.1f} ms")
            for name, (low, middle, high) in summary["over_full"].items():
                print(f"    {name:10s} / full {middle:.3f}  [{low:.3f}, {high:.3f}]", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
