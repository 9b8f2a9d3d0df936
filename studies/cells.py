"""Results that survive a kill: one JSON file for each cell, written whole or not at all."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Cell:
    """A part of a study that is computed at once.

    Args:
        name: ``"folder/name"``, of its file.
        function: Computes it; a function of a module, so that another process finds it.
        arguments: Those of ``function``.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


class Results:
    """Cells in a folder.

    Args:
        folder: Where their files are.
        workers: How many processes compute, each with one thread.
        report: Called with the name of each cell that was computed.
    """

    def __init__(self, folder: Path, workers: int = 1, report: Callable[[str], None] = print) -> None:
        self.folder = folder
        self.workers = workers
        self.report = report

    def get(self, cells: Sequence[Cell]) -> list[Any]:
        """Read ``cells``, after computing those that have no file yet.

        What is read is what was written: floats have five significant digits from the first time on.
        """
        missing = [cell for cell in cells if not self._path(cell).exists()]
        if self.workers == 1:
            for cell in missing:
                self._write(cell, _compute(cell))
        elif missing:
            with ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn")) as pool:
                waiting = {pool.submit(_compute, cell): cell for cell in missing}
                for done in as_completed(waiting):
                    self._write(waiting[done], done.result())
        return [json.loads(self._path(cell).read_text()) for cell in cells]

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"

    def _write(self, cell: Cell, value: Any) -> None:
        path = self._path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(rounded(value), separators=(",", ":")) + "\n")
        os.replace(unfinished, path)
        self.report(cell.name)


def _compute(cell: Cell) -> Any:
    """Compute ``cell`` with one thread, so that sums have one order on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return cell.function(*cell.arguments)
    finally:
        torch.set_num_threads(threads)


def rounded(value: Any) -> Any:
    """Round floats in ``value`` to five significant digits; those that are not finite become None."""
    if isinstance(value, dict):
        return {str(key): rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
