"""Count what one adapted Linear launches in its forward and backward, beside the frozen layer and PEFT's.

    python benchmarks/launches.py

A launch is an operation that reaches the device: views, metadata and memory that is only allocated are none. They are
counted as torch dispatches them, so the counts are those of any device.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_lora

METHODS = ("base", "factored", "merged", "projected", "peft")
PRECISIONS = ("fp32", "bf16-mixed", "bf16-true")
NO_LAUNCH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh")

READS = ("_local_scalar_dense", "equal", "is_nonzero")
"""What gives a number for which the device has to compute or copy."""


class Launches(TorchDispatchMode):
    """Keep the names of all operations that launch something, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        schema = func._schema  # a question, such as `promote_types`, gives no tensor and writes to none
        gives = schema.is_mutable or name in READS or any("Tensor" in str(found.type) for found in schema.returns)
        if gives and not func.is_view and name not in NO_LAUNCH:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def adapted_linear(method: str, bias: bool, dtype: torch.dtype, alpha: float) -> nn.Module:
    """One Linear, 64 to 48, adapted by ``method`` with rank 8; A and B are float32 in all of them."""
    model = nn.Sequential(nn.Linear(64, 48, bias=bias)).to(dtype)
    if method == "base":
        return model.requires_grad_(False)
    if method == "peft":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=8, lora_alpha=alpha, target_modules=["0"]))
    lightning_lora.inject(model, rank=8, alpha=alpha, gradient=method, target_modules=["0"])
    return model


def count(method: str, precision: str, bias: bool = True, alpha: float = 8) -> tuple[list[str], list[str]]:
    """What a forward launches, and what a backward does, whose input requires a gradient."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    model = adapted_linear(method, bias, dtype, alpha)
    x = torch.randn(4, 16, 64, dtype=dtype, requires_grad=True)
    forward, backward = Launches(), Launches()
    mixed = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
    with mixed, forward:
        y = model(x)
    dy = torch.ones_like(y)
    with backward:
        y.backward(dy)
    return forward.names, backward.names


def main() -> None:
    print("| forward + backward | alpha / r | " + " | ".join(METHODS) + " |\n|---" + "|---" * (1 + len(METHODS)) + "|")
    for precision in PRECISIONS:
        for bias in (True, False):
            for alpha in (8, 16):
                found = [count(method, precision, bias, alpha) for method in METHODS]
                cells = (f"{len(forward)} + {len(backward)}" for forward, backward in found)
                print(f"| {precision}, {'bias' if bias else 'no bias'} | {alpha // 8} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
