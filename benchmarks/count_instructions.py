"""Instructions that a forward and a backward of one Linear take, counted by valgrind: the same in every run.

    OMP_NUM_THREADS=1 python benchmarks/count_instructions.py

Unlike times, counts do not depend on what else the machine does. They say how much is done, not how long it takes:
valgrind has no AVX-512, so products take more instructions than they would. The small shape shows what surrounds the
products: Python, autograd, and the choice of kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

SHAPES = {"small": (16, 64, 64), "as in the Llama-like model": (1024, 512, 512)}
"""Rows, inputs and outputs."""
KINDS = ("trained in full", "frozen", "PEFT", "factored", "merged", "projected")
STEPS = 5
RESULTS = Path(__file__).parents[1] / "docs" / "benchmarks" / "instructions.json"


def count(kind: str, shape: str, rank: int) -> float:
    """Instructions for one step."""
    command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--callgrind-out-file=/dev/null"]
    command += [sys.executable, __file__, "--inside", kind, shape, "--rank", str(rank)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (collected,) = re.findall(r"Collected : (\d+)", printed)
    return int(collected) / STEPS


def run(kind: str, shape: str, rank: int) -> None:
    """The steps themselves, counted after some that are not."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    b, n, m = SHAPES[shape]
    module: nn.Module = nn.Sequential(nn.Linear(n, m, bias=False))
    if kind == "frozen":
        module.requires_grad_(False)
    elif kind == "PEFT":
        from peft import LoraConfig, get_peft_model

        module = get_peft_model(module, LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]))  # type: ignore[arg-type]
    elif kind != "trained in full":
        import lightning_lora

        lightning_lora.inject(module, rank=rank, gradient=kind)
    x, dy = torch.randn(b, n, requires_grad=True), torch.randn(b, m)
    for step in range(3 + STEPS):
        if step == 3:
            subprocess.run(["callgrind_control", "--instr=on", str(os.getpid())], check=True, capture_output=True)
        module(x).backward(dy)
        x.grad = None
        module.zero_grad()
    subprocess.run(["callgrind_control", "--instr=off", str(os.getpid())], check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        run(*arguments.inside, arguments.rank)
        return
    results: dict[str, dict[str, float]] = {}
    for shape, sides in SHAPES.items():
        print(f"{shape}: {' x '.join(map(str, sides))}", flush=True)
        counts = results[shape] = {}
        for kind in KINDS:
            counts[kind] = count(kind, shape, arguments.rank)
            print(f"  {kind:16s} {counts[kind] / 1e6:9.2f} million instructions", flush=True)
    RESULTS.write_text(json.dumps({"rank": arguments.rank, "steps": STEPS, "instructions": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
