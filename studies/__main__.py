"""Reproduce every study.

    python -m studies run                    all of them, into studies/results and docs/studies
    python -m studies run cost additive      these alone
    python -m studies run --quick            short runs of everything, in a folder for temporary files
    python -m studies run --workers 2        two processes

A run that was stopped goes on where it was: what has a file in the folder of results is not computed again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from studies import additive, cost, forgetting, projections, report, symmetry
from studies.cells import Results, rounded
from studies.methods import FULL, QUICK

STUDIES = {
    "forgetting": forgetting.study,
    "projections": projections.study,
    "additive": additive.study,
    "symmetry": symmetry.study,
    "cost": cost.study,
}
ROOT = Path(__file__).parents[1]


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m studies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run"])
    parser.add_argument("names", nargs="*", metavar="name", help=f"some of: {', '.join(STUDIES)}; by default all")
    parser.add_argument("--quick", action="store_true", help="fewer methods, seeds and steps: whether it runs")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--results", type=Path, help="the folder of results; by default studies/results")
    parser.add_argument("--docs", type=Path, help="the folder of tables and figures; by default docs/studies")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.names if name not in STUDIES]:
        parser.error(f"no study is called {unknown[0]!r}; there are {', '.join(STUDIES)}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.results or (Path(temporary, "results") if given.quick else ROOT / "studies/results")
        docs = given.docs or (Path(temporary, "docs") if given.quick else ROOT / "docs/studies")
        results = Results(folder, given.workers, lambda line: print(line, flush=True))
        for name in given.names or STUDIES:
            summary = rounded(STUDIES[name](results, QUICK if given.quick else FULL))
            (folder / "summaries").mkdir(parents=True, exist_ok=True)
            (folder / "summaries" / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
            report.write(name, summary, docs)
            print(f"{name}: done after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
