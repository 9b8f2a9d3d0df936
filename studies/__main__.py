"""Run: ``python -m studies run``."""

from __future__ import annotations

import argparse
from pathlib import Path

from studies.cells import Results
from studies.methods import FULL, LOW, METHODS, QUICK, runs

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    results = Results(arguments.results, arguments.workers)
    names = ["full","DoRA r=8"]
    names.insert(1, LOW)
    runs(results, names, QUICK if arguments.quick else FULL)
