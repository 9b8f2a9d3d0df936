"""Time of one training step: full fine-tuning, peers, ours, and the floor, interleaved in one process.

    python benchmarks/step_time.py --job llama --rounds 30 --json step_time.json

Each round runs one step (forward, backward, AdamW) of every method, in an order drawn anew. What is reported is the
median over rounds of the ratio to ``full`` (and to ``peft`` and ``floor``) in the same round, with its quartiles: the
machine's speed drifts, ratios within a round do not.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lightning_lora

Batch = dict[str, Tensor]
Step = Callable[[], None]


class CausalLMJob:
    """A causal language model on random tokens."""

    def __init__(self, model: nn.Module, vocabulary: int, batch: int, length: int) -> None:
        self.model = model
        tokens = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
        self.batch = {"input_ids": tokens, "labels": tokens}

    def loss(self, model: nn.Module) -> Tensor:
        return model(**self.batch, use_cache=False).loss


class MLPJob:
    """A wide multilayer perceptron on random rows."""

    def __init__(self, width: int, rows: int) -> None:
        layers = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())]
        self.model = nn.Sequential(*layers, nn.Linear(width, 10))
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, width, generator=generator)
        self.y = torch.randint(10, (rows,), generator=generator)

    def loss(self, model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(self.x), self.y)


def llama() -> CausalLMJob:
    """(a) Llama-like, d = 512, 4 layers, 8 x 128 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=4096,
        max_position_embeddings=256,
    )
    return CausalLMJob(LlamaForCausalLM(config), 4096, batch=8, length=128)


def smollm() -> CausalLMJob:
    """(b) The shape of SmolLM2-135M (random weights), 4 x 128 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return CausalLMJob(LlamaForCausalLM(config), 49152, batch=4, length=128)


class ImageJob:
    """An image classifier on random images."""

    def __init__(self, model: nn.Module, images: int, size: int) -> None:
        self.model = model
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(images, 3, size, size, generator=generator)
        self.y = torch.randint(10, (images,), generator=generator)

    def loss(self, model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(self.x).logits, self.y)


def resnet() -> ImageJob:
    """(c) ResNet-18, 16 images of 32 x 32, all convolutions adapted."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
    )
    return ImageJob(ResNetForImageClassification(config).train(), images=16, size=32)


def mlp() -> MLPJob:
    """(d) A wide MLP, 4 layers of 2048, 512 rows."""
    return MLPJob(2048, 512)


def target_names(model: nn.Module) -> list[str]:
    """All convolutions where there are any, else what ``target_modules="all-linear"`` adapts."""
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return convolutions or lightning_lora.inject(copy.deepcopy(model), rank=1)


def full(model: nn.Module, rank: int) -> None:
    """Full fine-tuning."""


def floor(model: nn.Module, rank: int) -> None:
    """Forward and dX only: what any method costs that freezes W0. The input of the first layer requires a gradient."""
    model.requires_grad_(False)
    first = model.get_submodule(target_names(model)[0])
    first.register_forward_pre_hook(lambda _, args: (args[0].detach().requires_grad_(), *args[1:]))


def peft(model: nn.Module, rank: int) -> None:
    """PEFT's LoRA on the same modules."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = target_names(model)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


class _Formed(nn.Module):
    """W0 + B^T A as a parametrization (seed, eq. lora-1)."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        m, n = weight.flatten(1).shape
        self.A = nn.Parameter(torch.randn(rank, n) / rank)
        self.B = nn.Parameter(torch.zeros(rank, m))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.B.T @ self.A).view_as(weight)


def formed(model: nn.Module, rank: int) -> None:
    """W0 + AB formed in every forward (seed, eq. lora-1)."""
    targets = target_names(model)
    model.requires_grad_(False)
    for name in targets:
        module = model.get_submodule(name)
        parametrize.register_parametrization(module, "weight", _Formed(module.weight, rank))


def factored(model: nn.Module, rank: int) -> None:
    """``gradient="factored"`` (seed, eq. lora-2)."""
    lightning_lora.inject(model, rank=rank, target_modules=target_names(model))


def merged(model: nn.Module, rank: int) -> None:
    """``gradient="merged"``."""
    lightning_lora.inject(model, rank=rank, target_modules=target_names(model), gradient="merged")


def projected(model: nn.Module, rank: int) -> None:
    """``gradient="projected"`` (seed, eq. grad-1)."""
    lightning_lora.inject(model, rank=rank, target_modules=target_names(model), gradient="projected")


JOBS: dict[str, Callable[[], Any]] = {"llama": llama, "smollm": smollm, "resnet": resnet, "mlp": mlp}
METHODS: dict[str, Callable[[nn.Module, int], None]] = {
    f.__name__: f for f in (full, floor, peft, formed, factored, merged, projected)
}


def make_step(job: Any, method: str, rank: int) -> Step:
    model = copy.deepcopy(job.model)
    METHODS[method](model, rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    if optimizer is not None and lightning_lora.adapters(model):
        lightning_lora.attach(model, optimizer)

    def step() -> None:
        job.loss(model).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure(steps: dict[str, Step], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    order = list(steps)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(rounds + warmup):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            steps[name]()
            if done >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def ratios(times: dict[str, list[float]], over: str) -> dict[str, list[float]]:
    """For each method the quartiles of its time over that of ``over`` in the same round."""
    return {
        name: statistics.quantiles((a / b for a, b in zip(times[name], times[over], strict=True)), n=4)
        for name in times
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=JOBS, default="llama")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    random.seed(0)
    torch.manual_seed(0)
    job = JOBS[arguments.job]()
    steps = {method: make_step(job, method, arguments.rank) for method in arguments.methods}
    times = measure(steps, arguments.rounds)
    result: dict[str, Any] = {
        "job": arguments.job,
        "rank": arguments.rank,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "median_seconds": {name: statistics.median(values) for name, values in times.items()},
    }
    print(f"{job.__class__.__name__} {JOBS[arguments.job].__doc__}")
    for over in ("full", "peft", "floor"):
        if over in times:
            result[f"over_{over}"] = ratios(times, over)
            for name, (low, middle, high) in result[f"over_{over}"].items():
                print(f"{name:10s} / {over:6s} {middle:.3f}  [{low:.3f}, {high:.3f}]")
    print({name: f"{1000 * value:.1f} ms" for name, value in result["median_seconds"].items()})
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
