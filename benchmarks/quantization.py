"""What quantising W0 costs and what merging costs, for every supported kind, on a small network.

    python benchmarks/quantization.py --json docs/benchmarks/quantization.json

A network of four Linears of 512 x 512 is trained in full on one function, quantised, and fine-tuned by adapters of rank
8 on another. ``before`` is the loss on that before the first step, ``after`` after the last, ``merged`` that of the
plain network with merged weights, in float32 and rounded to bfloat16, ``quantised_again`` that of merged weights that
were quantised again. Losses are shares of the variance, on inputs not trained on. Errors are those of the entries of
all weights, in units of their root mean square; so is ``increment_mean``, the mean size of an entry of the increments.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lora import adapters, inject, merge, merging_errors
from lightning_lora.weights import read_only_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from quantized import KINDS

SIDE, BATCH = 512, 256


def network() -> nn.Sequential:
    linears = [nn.Linear(SIDE, SIDE) for _ in range(4)]
    return nn.Sequential(
        nn.LayerNorm(SIDE), *itertools.chain(*((linear, nn.GELU()) for linear in linears[:-1])), linears[-1]
    )


def function(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(SIDE, 32), nn.Tanh(), nn.Linear(32, SIDE)).requires_grad_(False)


def inputs(count: int, generator: torch.Generator) -> Tensor:
    """Rows in a subspace of 16 dimensions, the same for all."""
    basis = torch.randn(16, SIDE, generator=torch.Generator().manual_seed(3))
    return torch.randn(count, 16, generator=generator) @ basis / 4


def loss(model: nn.Module, teacher: nn.Module, x: Tensor) -> Tensor:
    y = teacher(x)
    return nn.functional.mse_loss(model(x), y) / y.var()


def test(model: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        return loss(model, teacher, inputs(2048, torch.Generator().manual_seed(8))).item()


def train(model: nn.Module, teacher: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, teacher, inputs(BATCH, generator)).backward()
        optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.stack([layer.weight.detach().clone() for layer in model if isinstance(layer, nn.Linear)])


def quantised(model: nn.Sequential, kind: str) -> nn.Sequential:
    made = copy.deepcopy(model)
    for index, layer in enumerate(made):
        if isinstance(layer, nn.Linear):
            made[index] = KINDS[kind](layer)
    return made


def dequantised(model: nn.Module) -> Tensor:
    return torch.stack([stored.full() for stored in read_only_weights(model).values()])


def measure(kind: str, pretrained: nn.Sequential, teacher: nn.Module, steps: int) -> dict[str, float]:
    W = weights(pretrained)
    rms = W.square().mean().sqrt().item()
    model = quantised(pretrained, kind)
    W0 = dequantised(model)
    nbytes = sum(t.nbytes for stored in read_only_weights(model).values() for t in stored.tensors())
    inject(model, rank=8)
    result = {
        "bits_per_weight": 8 * nbytes / W.numel(),
        "quantisation_mean": (W0 - W).abs().mean().item() / rms,
        "quantisation_max": (W0 - W).abs().max().item() / rms,
        "before": test(model, teacher),
    }
    train(model, teacher, steps)
    result["after"] = test(model, teacher)
    result["increment_mean"] = sum(a.delta_weight().abs().mean().item() for a in adapters(model).values()) / 4 / rms
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        merged = copy.deepcopy(model)
        merged[0].to(dtype)  # the rest of the model, by which the dtype of the merged weights goes
        errors = merging_errors(merged).values()
        result[f"merging_{name}_mean"] = sum(mean for _, mean in errors) / len(errors) / rms
        result[f"merging_{name}_max"] = max(most for most, _ in errors) / rms
        merge(merged)
        result[f"merged_{name}"] = test(merged.float(), teacher)
        if dtype is torch.float32:
            again = quantised(merged, kind)
            result["quantising_again_mean"] = (dequantised(again) - weights(merged)).abs().mean().item() / rms
            result["quantised_again"] = test(again.train(), teacher)
    return result


def measure_plain(pretrained: nn.Sequential, teacher: nn.Module, steps: int) -> dict[str, float]:
    model = copy.deepcopy(pretrained)
    inject(model, rank=8)
    before = test(model, teacher)
    train(model, teacher, steps)
    return {"bits_per_weight": 32.0, "before": before, "after": test(model, teacher)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    pretrained = network()
    train(pretrained, function(1), 2 * options.steps)
    teacher = function(1)
    teacher[0].weight.add_(0.5 * function(2)[0].weight)
    results = {}
    for kind in ("float32", *KINDS):
        if kind == "float32":
            results[kind] = measure_plain(pretrained, teacher, options.steps)
        else:
            results[kind] = measure(kind, pretrained, teacher, options.steps)
        print(kind, json.dumps({name: float(f"{value:.3g}") for name, value in results[kind].items()}), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
