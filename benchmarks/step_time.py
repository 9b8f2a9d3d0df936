"""Time of one training step: full fine-tuning, peers, ours, and the floor, interleaved in one process.

    python benchmarks/step_time.py --job llama --rounds 30 --json step_time.json

Each round runs one step (forward, backward, AdamW) of every method, in an order drawn anew. What is reported is the
median over rounds of the ratio to ``full`` (and to ``peft`` and ``floor``) in the same round, with its quartiles: the
machine's speed drifts, ratios within a round do not.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from common import (
    GRADIENTS,
    JOBS,
    METHODS,
    environment,
    make_model,
    make_step,
    make_validation_step,
    measure,
    summarize,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=JOBS, default="llama")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(GRADIENTS))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--validation", action="store_true", help="validation steps, without gradients")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    random.seed(0)
    torch.manual_seed(0)
    job = JOBS[arguments.job]()
    make = make_validation_step if arguments.validation else make_step
    steps = {method: make(job, make_model(job, method, arguments.rank)) for method in arguments.methods}
    result = {
        "job": arguments.job,
        "rank": arguments.rank,
        "rounds": arguments.rounds,
        "validation": arguments.validation,
        **environment(),
        **summarize(measure(steps, arguments.rounds)),
    }
    print(f"{job.__class__.__name__} {JOBS[arguments.job].__doc__}")
    for over in ("full", "peft", "floor"):
        for name, (low, middle, high) in result.get(f"over_{over}", {}).items():
            print(f"{name:10s} / {over:6s} {middle:.3f}  [{low:.3f}, {high:.3f}]")
    print({name: f"{1000 * value:.1f} ms" for name, value in result["median_seconds"].items()})
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
