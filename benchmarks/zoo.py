"""Runs other people's models with ``LoRA()`` as it stands, and writes what worked to ``docs/zoo.md``.

Every library gets an environment of its own, which shares torch and Lightning with the running one. Every row is a
process with a limit of time. The rows are in ``zoo_rows.py``, what is checked is in ``zoo_checks.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from zoo_rows import ROWS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "benchmarks" / "zoo.json"
TABLE = ROOT / "docs" / "zoo.md"
CHECKS = ("fit", "W0", "factored output", "file", "resume", "merged", "projected")
INTRODUCTION = f"""# The zoo

Models of other people's libraries, trained for a few steps by the library's own way to give arguments to its Trainer,
with `LoRA()` as it stands. Made by `python benchmarks/zoo.py` with Python {sys.version.split()[0]} and torch
{torch.__version__}, on a CPU.

- **fit**: it trains. Where it does not, and the error says to use `gradient="merged"`, "file" and "resume" are of a run
  with that.
- **W0**: the weights that have an adapter are bitwise what they were, at the end of training, while adapted.
- **output**: the adapted module's output equals the merged module's. Given: the largest difference, and how much
  training changed the output.
- **file**: after `fit` the module holds bit for bit what the last checkpoint holds. In a process that never imports
  this library the checkpoint loads with `weights_only=True` and strict into the plain model, whose output is then the
  adapted module's; before the first step both had the same loss. (1) The library pickles objects of its own into every
  checkpoint, so `weights_only=True` refuses those of plain runs too.
- **resume**: continuing from the first epoch's checkpoint ends at the same step with the same bits as the whole run;
  "as without LoRA, to other bits" where a run of the library alone does not do that either.
- **merged**, **projected**: the same with these gradients; output as above, and the losses are those of the first run.

"""


def make_environment(folder: Path, library: str) -> Path:
    """Make an environment with ``library`` in ``folder``, and return its interpreter.

    Raises:
        RuntimeError: If pip fails, or has put another torch or Lightning into it.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        shared = [path for path in sys.path if path.endswith("site-packages")]
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        (folder / "lib" / version / "site-packages" / "shared.pth").write_text("\n".join(shared) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    result = subprocess.run(
        [*pip, "-c", str(ROOT / "constraints.txt"), library], capture_output=True, text=True, check=False
    )
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
    if result.returncode:
        raise RuntimeError(f"pip: {(errors or ['failed'])[0]}")
    ask = "from importlib.util import find_spec; print(find_spec('torch').origin, find_spec('lightning').origin)"
    theirs, ours = (
        subprocess.run([which, "-c", ask], capture_output=True, text=True, check=True).stdout
        for which in (str(python), sys.executable)
    )
    if theirs != ours:
        raise RuntimeError(f"pip put another torch or Lightning into the environment: {theirs.strip()}")
    return python


def run_row(name: str, python: Path, folder: Path, timeout: float) -> dict[str, Any]:
    """Run one row in a process group of its own, which does not outlive ``timeout``."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [str(python), str(ROOT / "benchmarks" / "zoo_checks.py"), name, "--folder", str(folder)]
    began = time.perf_counter()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"killed after {timeout:.0f} s"}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if not (folder / "row.json").exists():
        return {"error": ((folder / "log").read_text().strip().splitlines() or ["no output"])[-1]}
    return {**json.loads((folder / "row.json").read_text()), "seconds": round(time.perf_counter() - began)}


def cell(check: dict[str, Any] | None) -> str:
    """Return what the table says of one check."""
    if check is None:
        return ""
    if not check["ok"]:
        return "**fails**"
    return f"yes{' (1)' if check.get('pickled') else ''}{', ' + check['text'] if 'text' in check else ''}"


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the page."""
    header = ["library", "model", "adapters", "left out", *(name.removeprefix("factored ") for name in CHECKS)]
    lines = [header, ["---"] * len(header)]
    errors = []
    for name, row in ROWS.items():
        if (result := results.get(name)) is None:
            continue
        checks = result.get("checks", {})
        adapters = checks.get("adapters", {})
        lines.append(
            [
                f"{row.library} {result.get('version', '')}".strip(),
                row.model,
                adapters.get("text", ""),
                adapters.get("left_out", ""),
                *(cell(checks.get(check)) for check in CHECKS),
            ]
        )
        if "error" in result:
            errors.append(f"- {row.library}, {row.model}: {result['error']}")
        errors += [
            f"- {row.library}, {row.model}, {check}: {found['error']}"
            for check, found in checks.items()
            if not found["ok"]
        ]
    page = INTRODUCTION + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    return page + ("\nWhat fails, and how:\n\n" + "\n".join(errors) + "\n" if errors else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"only these, of {', '.join(ROWS)}")
    parser.add_argument("--work", type=Path, help="where the environments go; by default a temporary folder")
    parser.add_argument("--keep", action="store_true", help="keep the environments and the rows' files")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a row")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no such rows: {', '.join(sorted(unknown))}")
    names = args.rows or list(ROWS)
    work = args.work or Path(tempfile.mkdtemp(prefix="zoo-"))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and args.rows else {}
    for library in dict.fromkeys(ROWS[name].library for name in names):
        environment = work / library
        try:
            python, error = make_environment(environment, library), ""
        except RuntimeError as failure:
            python, error = environment, str(failure)
        for name in (name for name in names if ROWS[name].library == library):
            result = {"error": error} if error else run_row(name, python, work / f"row-{name}", args.timeout)
            for check in result.get("checks", {}).values():
                for long in ("traceback", "names", "losses"):
                    check.pop(long, None)
            results[name] = result
            failed = [check for check, found in result.get("checks", {}).items() if not found["ok"]]
            print(f"{name}: {result.get('error') or 'fails: ' + ', '.join(failed) if failed or error else 'works'}")
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            TABLE.write_text(table(results))
            if not args.keep:
                shutil.rmtree(work / f"row-{name}", ignore_errors=True)
        if not args.keep:
            shutil.rmtree(environment, ignore_errors=True)
    if args.work is None and not args.keep:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
