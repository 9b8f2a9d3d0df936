"""The runs of ``distributed`` with projections drawn anew. As a program: Lightning starts it again for each process."""

import sys
from pathlib import Path
from unittest import mock

import distributed

EVERY_STEP = {"gradient": "merged", "resample_every_n_steps": 1}

RUNS = {
    "both": {"lora": EVERY_STEP, "trainer": {}},
    "A": {"lora": {**EVERY_STEP, "resample": "A"}, "trainer": {}},
    "both, projected, every 2": {
        "lora": {"gradient": "projected", "resample_every_n_steps": 2},
        "trainer": {},
    },
    "A, bf16-true, accumulated": {
        "lora": {**EVERY_STEP, "resample": "A"},
        "trainer": {"precision": "bf16-true", "accumulate_grad_batches": 2},
    },
}


def train(folder: Path, name: str, devices: int):
    """A run by this many processes."""
    with mock.patch.dict(distributed.RUNS, RUNS, clear=True):
        return distributed.train(folder, name, devices)


def main(folder: Path) -> None:
    with mock.patch.dict(distributed.RUNS, RUNS, clear=True):
        distributed.main(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
