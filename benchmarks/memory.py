"""Memory of one training step for every method, each in a process of its own.

    python benchmarks/memory.py --json memory.json

The allocator reports every allocation and release to ``torch.profiler``; the running sum of these is what is held, its
maximum is the peak. Memory that does not pass through torch's allocator is not seen. Reported:

    before      held when model and adapters are built
    first_peak  peak of the first step, above ``before``
    held        held after the first step: model, adapters, optimizer state
    peak        peak of the second step, above ``held``
    saved       held for the backward of the third: unique storages that are not parameters or buffers
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import GRADIENTS, JOBS, METHODS, environment, make_model, make_step
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def traced(run: Callable[[], Any]) -> tuple[Any, int, int]:
    """What ``run`` returns, and the bytes that it holds at its peak and at its end, above those at its start."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        returned = run()
        gc.collect()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = list(itertools.accumulate((event.nbytes() for event in events), initial=0))
    return returned, max(held), held[-1]


def saved_for_backward(job: Any, model: nn.Module) -> int:
    """Bytes of what the graph of the loss keeps."""
    known = {tensor.untyped_storage().data_ptr() for tensor in itertools.chain(model.parameters(), model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = job.loss(model)  # alive until its storages, and so their addresses, have been counted
    saved = sum(size for address, size in sizes.items() if address not in known)
    del loss
    return saved


def memory(name: str, method: str, rank: int) -> dict[str, int]:
    """Bytes; what they are is said at the top of this file."""
    torch.manual_seed(0)
    job = JOBS[name]()
    model, _, before = traced(lambda: make_model(job, method, rank))
    step = make_step(job, model)
    _, first_peak, kept = traced(step)
    _, peak, _ = traced(step)
    return {
        "before": before,
        "first_peak": first_peak,
        "held": before + kept,
        "peak": peak,
        "saved": saved_for_backward(job, model),
    }


def in_new_process(*arguments: Any) -> dict[str, int]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(memory, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(GRADIENTS))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    result: dict[str, Any] = {"rank": arguments.rank, **environment(), "jobs": {}}
    for job in arguments.jobs:
        print(JOBS[job].__doc__)
        result["jobs"][job] = {}
        for method in arguments.methods:
            row = in_new_process(job, method, arguments.rank)
            result["jobs"][job][method] = row
            print(f"{method:10s}", *(f"{name} {size / 2**20:7.1f} MiB " for name, size in row.items()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
