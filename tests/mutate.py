"""How many small faults the tests notice: ``python tests/mutate.py --mutants 50 -- -x tests/test_adapters.py``.

A mutant is the package with one comparison, operator, sign, constant or statement changed. A sample of all of them is
drawn; the tests run on each in a copy of the repository. One that no test fails on survives. What stands after ``--``
goes to pytest.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lightning_lora"

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
}
DELETED = (ast.Assign, ast.AugAssign, ast.Delete, ast.Expr, ast.Raise, ast.Continue, ast.Break)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one node; ``index`` is the place of the node in ``ast.walk`` of the file."""

    file: Path
    line: int
    index: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.before}  ->  {self.after}"

    def source(self) -> str:
        """Return the text of the file with the change."""
        tree = ast.parse(self.file.read_text())
        old = list(ast.walk(tree))[self.index]
        new = changed(old)
        for parent in ast.walk(tree):
            for field, value in ast.iter_fields(parent):
                if value is old:
                    setattr(parent, field, new)
                elif isinstance(value, list):
                    value[:] = [new if item is old else item for item in value]
        return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def changed(node: ast.AST) -> ast.AST | None:
    """Return the faulty node that takes the place of ``node``, or None if there is none."""
    new: ast.AST = copy.deepcopy(node)
    match new:
        case ast.Compare(ops=[first, *rest]):
            new.ops = [COMPARISONS[type(first)](), *rest]
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            new.op = OPERATORS[type(op)]()
        case ast.BoolOp(op=op):
            new.op = ast.Or() if isinstance(op, ast.And) else ast.And()
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            return operand
        case ast.Constant(value=bool(value)):
            new.value = not value
        case ast.Constant(value=int(value)):
            new.value = value + 1
        case ast.Constant(value=float(value)):
            new.value = 2 * value or 1.0
        case ast.Return(value=ast.expr() as value) if not is_none(value):
            new.value = ast.Constant(None)
        case ast.Expr(value=ast.Constant()):  # a docstring
            return None
        case _ if isinstance(new, DELETED):
            return ast.Pass()
        case _:
            return None
    return new


def is_none(node: ast.expr) -> bool:
    """Tell whether ``node`` is the constant None."""
    return isinstance(node, ast.Constant) and node.value is None


def left_out(tree: ast.Module) -> set[int]:
    """Return the ids of the nodes that no run executes: annotations, and what only a type checker reads."""
    roots: list[ast.AST | None] = []
    for node in ast.walk(tree):
        match node:
            case ast.arg() | ast.AnnAssign():
                roots.append(node.annotation)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                roots.append(node.returns)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                roots += node.body
            case ast.Assign(targets=[ast.Name(id="__all__" | "__version__")]):
                roots.append(node)
    return {id(node) for root in roots if root is not None for node in ast.walk(root)}


def mutants(file: Path) -> Iterator[Mutant]:
    """Yield every mutant of ``file``."""
    tree = ast.parse(file.read_text())
    never_run = left_out(tree)
    for index, node in enumerate(ast.walk(tree)):
        if id(node) not in never_run and (new := changed(node)) is not None:
            before, after = (" ".join(ast.unparse(part).split())[:90] for part in (node, new))
            yield Mutant(file, node.lineno, index, before, after)  # type: ignore[attr-defined]


def copied(folder: Path) -> Path:
    """Copy what git knows of the repository, and what it does not ignore, to ``folder``."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def passes(folder: Path, options: list[str], timeout: float | None) -> tuple[bool, str]:
    """Return whether the tests pass in ``folder`` in ``timeout`` seconds, and the last line that they print."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=printed, stderr=printed, start_new_session=True
        )
        try:
            passed = process.wait(timeout) == 0
        except subprocess.TimeoutExpired:
            passed = False
        with contextlib.suppress(ProcessLookupError):  # what the tests have started, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        printed.seek(0)
        lines = printed.read().splitlines() or [""]
    return passed, lines[-1] if process.returncode >= 0 else "timeout"


def main() -> None:
    """Run the sample, and print what was caught and what survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=50, help="how many are drawn (50)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument("--timeout", type=float, help="seconds for each; by default three times the tests' own time")
    parser.add_argument("--files", nargs="+", default=["**/*.py"], help="patterns of files in the package (all)")
    parser.add_argument("pytest", nargs="*", default=["-x", "-q"], help="arguments of pytest, after -- (-x -q)")
    arguments = parser.parse_args()

    files = sorted({file for pattern in arguments.files for file in (ROOT / PACKAGE).glob(pattern)})
    every = [mutant for file in files for mutant in mutants(file)]
    drawn = random.Random(arguments.seed).sample(every, min(arguments.mutants, len(every)))
    print(f"{len(drawn)} of {len(every)} mutants of {len(files)} files", flush=True)

    survived = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = copied(Path(temporary))
        begin = time.perf_counter()
        passed, last = passes(folder, arguments.pytest, None)
        timeout = arguments.timeout or 3 * (time.perf_counter() - begin) + 30
        if not passed:
            sys.exit(f"The tests fail without a mutant: {last}")
        print(f"without a mutant: {last}; at most {timeout:.0f} s for each", flush=True)
        for number, mutant in enumerate(drawn, 1):
            original, place = mutant.file.read_text(), folder / mutant.file.relative_to(ROOT)
            place.write_text(mutant.source())
            passed, last = passes(folder, arguments.pytest, timeout)
            place.write_text(original)
            survived += [mutant] * passed
            print(f"{number:4} {'SURVIVED' if passed else 'caught  '} {mutant}  [{last.strip('= ')}]", flush=True)
    print(f"\ncaught {len(drawn) - len(survived)} of {len(drawn)}; survived:", *survived, sep="\n  ")


if __name__ == "__main__":
    main()
