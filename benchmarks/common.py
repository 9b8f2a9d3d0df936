"""What the benchmarks share: jobs, methods, one training step, and paired timing.

A job is a model with a fixed batch. A method makes a model ready for one way to train it. Timed steps of all methods
are interleaved in rounds: the machine's speed drifts, ratios within a round do not.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lightning_lora

Step = Callable[[], None]
Method = Callable[[nn.Module, int], None]


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


def llama_like(
    width: int,
    inner: int,
    layers: int,
    vocabulary: int,
    batch: int,
    *,
    key_value_heads: int,
    tied: bool = False,
    length: int = 128,
) -> CausalLMJob:
    """A Llama with random weights and heads of 64, on ``batch`` sequences of ``length`` tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        max_position_embeddings=max(256, length),
        tie_word_embeddings=tied,
    )
    return CausalLMJob(LlamaForCausalLM(config), vocabulary, batch, length)


def llama() -> CausalLMJob:
    """(a) Llama-like, d = 512, 4 layers, 8 x 128 tokens."""
    return llama_like(512, 1408, 4, 4096, batch=8, key_value_heads=8)


def smollm() -> CausalLMJob:
    """(b) The shape of SmolLM2-135M (random weights), 4 x 128 tokens."""
    return llama_like(576, 1536, 30, 49152, batch=4, key_value_heads=3, tied=True)


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
    """``model.benchmark_targets``, if set; else all convolutions where most layers are, else what is the default."""
    if (known := getattr(model, "benchmark_targets", None)) is not None:
        return known
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    return convolutions if len(convolutions) > linear else lightning_lora.inject(copy.deepcopy(model), rank=1)


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


def ours(**options: Any) -> Method:
    """This library with ``options``."""

    def method(model: nn.Module, rank: int) -> None:
        lightning_lora.inject(model, rank=rank, target_modules=target_names(model), **options)

    return method


JOBS: dict[str, Callable[[], Any]] = {"llama": llama, "smollm": smollm, "resnet": resnet, "mlp": mlp}
METHODS: dict[str, Method] = {
    "full": full,
    "floor": floor,
    "peft": peft,
    "formed": formed,
    "factored": ours(),
    "merged": ours(gradient="merged"),
    "projected": ours(gradient="projected"),
    "additive": ours(decomposition="additive"),
    "additive_merged": ours(decomposition="additive", gradient="merged"),
    "additive_projected": ours(decomposition="additive", gradient="projected"),
    "dora": ours(decomposition="dora"),
    "symmetric": ours(init="symmetric"),
    "symmetric_merged": ours(init="symmetric", gradient="merged"),
    "resample_both": ours(gradient="merged", resample_every_n_steps=1, resample_moments="reset"),
    "resample_A": ours(gradient="merged", resample_every_n_steps=1, resample="A", resample_moments="reset"),
}
GRADIENTS = tuple(METHODS)[:7]
"""What is compared unless other methods are asked for."""


def make_model(job: Any, method: str, rank: int) -> nn.Module:
    """A copy of the job's model, made ready for ``method``."""
    model = copy.deepcopy(job.model)
    METHODS[method](model, rank)
    return model


def make_step(job: Any, model: nn.Module) -> Step:
    """One training step: forward, backward, AdamW on whatever requires a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0) if trained else None
    if optimizer is not None and lightning_lora.adapters(model):
        lightning_lora.attach(model, optimizer)

    def step() -> None:
        job.loss(model).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def make_validation_step(job: Any, model: nn.Module) -> Step:
    """One validation step: the loss, without gradients."""
    model.eval()

    def step() -> None:
        with torch.no_grad():
            job.loss(model)

    return step


def measure(steps: dict[str, Step], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of each step in each round, in an order drawn anew for each round."""
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


def summarize(times: dict[str, list[float]]) -> dict[str, Any]:
    """The median time of each method, and the quartiles of its ratio to each method that others are held against."""
    return {
        "median_seconds": {name: statistics.median(values) for name, values in times.items()},
        **{f"over_{over}": ratios(times, over) for over in ("full", "peft", "floor") if over in times},
    }


def environment() -> dict[str, Any]:
    """What a result depends on besides the code."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}
