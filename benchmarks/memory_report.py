"""Holds ``LoRA.memory`` and ``estimate_memory`` against what the allocator gives out in real runs.

    python benchmarks/memory_report.py --json docs/benchmarks/memory_report.json

For each job: one process trains it in full, one with LoRA, both in plain PyTorch with ``torch.profiler`` watching the
allocator; a third trains it by a Trainer with the callback, and asks for an estimate of the same model on the meta
device. The allocator's figures are differences of what is held:

    parameters   when the model is built, less its buffers
    gradients    after the first backward, less before the forward; for projected gradients, which go before the
                 backward ends, the report's own addend (the largest adapted weight) is put on top and not tested
    optimizer    after the first optimizer step, less before it
    activations  after the second forward, with the batch made anew before it, less before both

The report's total is the sum of its parts. No moment of a step need hold that sum, since activations go while gradients
come: ``peak`` is the most that the second step holds, for comparison.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import GRADIENTS, JOBS, environment, make_model, target_names
from lightning.pytorch import Callback, LightningModule, Trainer
from memory import traced
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRA, Memory, attach, estimate_memory
from lightning_lora.injection.inject import places
from lightning_lora.memory.report import PARTS

MIB = 2**20


def real(name: str, method: str, rank: int) -> dict[str, int]:
    """Bytes that the allocator gives out for ``method``."""
    torch.manual_seed(0)
    job = JOBS[name]()
    model, _, built = traced(lambda: make_model(job, method, rank))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    if method != "full":
        attach(model, optimizer)

    def forward() -> tuple[Any, Tensor]:
        fresh = copy.copy(job)
        fresh.__dict__ = {key: copy.deepcopy(value) for key, value in vars(job).items() if key != "model"}
        return fresh, fresh.loss(model)

    def step() -> None:
        forward()[1].backward()
        optimizer.step()
        optimizer.zero_grad()

    _, _, gradients = traced(lambda: forward()[1].backward())
    _, _, state = traced(lambda: optimizer.step())
    optimizer.zero_grad()
    graph, _, activations = traced(forward)
    del graph
    _, peak, _ = traced(step)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    projected = [place.weight.nbytes for place in places(model) if not place.host.is_exact]
    return {
        "parameters": built - buffers,
        "gradients": gradients + max(projected, default=0),  # the full one that stands before it is projected
        "optimizer": state,
        "activations": activations,
        "peak": built + state + peak,
    }


class Module(LightningModule):
    """A job as a LightningModule; every step takes the job's batch."""

    def __init__(self, job: Any) -> None:
        super().__init__()
        self.job = copy.copy(job)
        self.model = self.job.__dict__.pop("model")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return batch.loss(self.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


def parts(memory: Memory) -> dict[str, int]:
    return {part: getattr(memory, part) for part in PARTS}


def fitted(name: str, options: dict[str, Any]) -> tuple[LoRA, Module, list[float]]:
    """The callback and the module of a run of 6 steps, and the CPU seconds of each."""
    torch.manual_seed(0)
    lora, module, clock = LoRA(**options), Module(JOBS[name]()), Clock()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=6,
        callbacks=[lora, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([module.job] * 6, batch_size=None))
    return lora, module, clock.seconds


def reported(name: str, gradient: str, rank: int) -> dict[str, Any]:
    """Bytes that the callback reports and that are estimated, and how long the first step takes longer for it."""
    warnings.simplefilter("ignore")
    targets = [f"model.{target}" for target in target_names(JOBS[name]().model)]
    options = {"rank": rank, "gradient": gradient, "target_modules": targets}
    fitted(name, {**options, "log_memory": False})  # what torch does once in a process
    _, _, plain = fitted(name, {**options, "log_memory": False})
    lora, module, watched = fitted(name, options)
    assert lora.memory is not None
    with torch.device("meta"):
        meta = Module(JOBS[name]())
    estimate = estimate_memory(meta, module.job, **options)
    seconds = watched[0] - plain[0]
    return {
        "notes": lora.memory.notes,
        "lora": parts(lora.memory.lora),
        "full": parts(lora.memory.full),
        "estimated lora": parts(estimate.lora),
        "estimated full": parts(estimate.full),
        "seconds": seconds,
        "share of 100 steps": seconds / (100 * statistics.median(plain[1:])),
    }


class Clock(Callback):
    """CPU seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self.start)


def in_new_process(function: Any, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def compare(title: str, found: dict[str, int], expected: dict[str, int]) -> None:
    """A line of the report's figures over the allocator's."""
    cells = [f"{part} {found[part] / MIB:8.2f} MiB {found[part] / expected[part] - 1:+7.2%}" for part in PARTS]
    total, real_total = (sum(sizes[part] for part in PARTS) for sizes in (found, expected))
    print(
        f"{title:14s}",
        *cells,
        f"total {total / real_total - 1:+.2%}",
        f"peak {expected['peak'] / MIB:.2f} MiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--gradients", nargs="+", choices=GRADIENTS, default=list(GRADIENTS))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    result: dict[str, Any] = {"rank": arguments.rank, **environment(), "jobs": {}}
    for job in arguments.jobs:
        print(JOBS[job].__doc__)
        full = in_new_process(real, job, "full", arguments.rank)
        result["jobs"][job] = {"full": full}
        for gradient in arguments.gradients:
            lora = in_new_process(real, job, gradient, arguments.rank)
            report = in_new_process(reported, job, gradient, arguments.rank)
            result["jobs"][job][gradient] = {"allocator": lora, "report": report}
            print(
                f"{gradient}: {report['seconds']:.2f} s, {report['share of 100 steps']:.2%} of 100 steps",
                *report["notes"],
            )
            compare("lora", report["lora"], lora)
            compare("full", report["full"], full)
            compare("estimate, lora", report["estimated lora"], lora)
            compare("estimate, full", report["estimated full"], full)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
