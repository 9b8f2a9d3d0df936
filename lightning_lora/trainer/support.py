"""What LoRA refuses before a run, and what it checks before the first step: each by name, with what to do instead."""

from __future__ import annotations

import os
from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import (
    DeepSpeedPrecision,
    FSDPPrecision,
    Precision,
    TransformerEnginePrecision,
    XLAPrecision,
)
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from lightning_lora.errors import LoRAError
from lightning_lora.injection.inject import Injection, adapters, places
from lightning_lora.injection.options import Options
from lightning_lora.weights import sharded as shards

try:  # from Lightning 2.6
    from lightning.pytorch.callbacks import WeightAveraging
except ImportError:  # pragma: no cover
    WeightAveraging = StochasticWeightAveraging  # type: ignore[assignment, misc]

AVERAGED = (
    "it averages A and B, and the average of products is not the product of averages; checkpoints hold merged weights,"
    " and the `state_dict` of several can be averaged"
)
REFUSED: Mapping[type[Callback], str] = {
    BaseFinetuning: "it freezes and unfreezes the parameters that LoRA has frozen; LoRA replaces it, with"
    " `modules_to_save` for what is to be trained in full",
    ModelPruning: "it rewrites the frozen weights while adapters are trained on them; prune the merged module after"
    " `fit`",
    StochasticWeightAveraging: AVERAGED,
    WeightAveraging: AVERAGED,
}


SUPPORTED_STRATEGIES: tuple[type[Strategy], ...] = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)
REFUSED_STRATEGIES: Mapping[type[Strategy], str] = {
    FSDPStrategy: "it flattens weights and adapters together, which leaves no adapter to save or merge by itself;"
    " `ModelParallelStrategy`, with `fully_shard` in `configure_model`, shards them one by one",
    DeepSpeedStrategy: "its engine keeps the parameters and writes the files itself, so nothing can be merged in them;"
    " `ModelParallelStrategy`, with `fully_shard` in `configure_model`, shards parameters and optimizer states too",
}

REFUSED_PRECISIONS: Mapping[type[Precision], str] = {
    TransformerEnginePrecision: "it puts layers of Transformer Engine, which carry no adapter, in the place of Linears;"
    " `precision='bf16-mixed'` or 'bf16-true' keeps them",
    FSDPPrecision: "it belongs to FSDPStrategy, which LoRA does not support; `precision='bf16-true'` and the like"
    " choose the plugin that fits the strategy",
    DeepSpeedPrecision: "it belongs to DeepSpeedStrategy, which LoRA does not support; `precision='bf16-true'` and the"
    " like choose the plugin that fits the strategy",
    XLAPrecision: "it belongs to the strategies for XLA devices, which LoRA does not support",
}


def refuse_unsupported(trainer: pl.Trainer) -> None:
    for strategy, reason in REFUSED_STRATEGIES.items():
        if isinstance(trainer.strategy, strategy):
            raise LoRAError(f"LoRA does not support {type(trainer.strategy).__name__}: {reason}.")
    if not isinstance(trainer.strategy, SUPPORTED_STRATEGIES):
        raise LoRAError(
            f"LoRA does not support {type(trainer.strategy).__name__}, which may shard or wrap the module in its"
            f" own way. It supports {', '.join(strategy.__name__ for strategy in SUPPORTED_STRATEGIES)}."
        )
    for plugin, reason in REFUSED_PRECISIONS.items():
        if isinstance(trainer.precision_plugin, plugin):
            raise LoRAError(f"LoRA does not support {plugin.__name__}: {reason}.")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, reason in REFUSED.items():
            if isinstance(callback, kind):
                raise LoRAError(
                    f"LoRA cannot be combined with {type(callback).__name__}: {reason}. Remove one of them."
                )


def refuse_unsharded(strategy: ModelParallelStrategy, options: Options, form: str) -> None:
    """Refuses what is not done to weights of which every process has a part."""
    name = type(strategy).__name__
    if strategy.device_mesh["tensor_parallel"].size() > 1:
        raise LoRAError(
            f"LoRA supports {name} with `tensor_parallel_size=1` only: a layer that is split over processes would need"
            " an adapter split alike. Use `data_parallel_size` for all of them, with `fully_shard`."
        )
    if options.init == "gradient":
        raise LoRAError(
            f"`init='gradient'` needs gradients of whole weights before adapters are put in, and under {name} adapters"
            " are put in before sharding. Use another `init`, such as 'pissa'."
        )
    if form != "merged":
        raise LoRAError(
            f"`checkpoint={form!r}` leaves weights out of the file, and {name} loads no file without all of them. Use"
            " `checkpoint='merged'`."
        )


def check_sharded(pl_module: pl.LightningModule) -> None:
    """Every adapter needs its gradients to be reduced over the processes."""
    for name, adapter in adapters(pl_module).items():
        if not all(shards.is_part(p) for p in adapter.trained.values()):
            raise LoRAError(
                f"The adapter of {name!r} is not sharded, so each process would train one of its own. In"
                f" `configure_model`, call `fully_shard` on {name!r} or a module round it, after `inject`."
            )


def check_complete(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """That the file just loaded into a sharded module has all but the adapters."""
    if trainer.ckpt_path is None or not os.path.isfile(trainer.ckpt_path):
        return  # a folder is asked for everything
    in_file = torch.load(trainer.ckpt_path, mmap=True, map_location="cpu", weights_only=True)["state_dict"]
    factors = tuple(place.factors for place in places(pl_module))
    if missing := [key for key in pl_module.state_dict() if key not in in_file and not key.startswith(factors)]:
        raise KeyError(f"{trainer.ckpt_path} has no {missing[0]!r}, nor {len(missing) - 1} more keys of the module.")


def check_there(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """That no adapted layer has been replaced, which a precision plugin can do after all hooks that come before."""
    for owner in pl_module.modules():
        if isinstance(injection := owner.__dict__.get("lora_injection"), Injection):
            found = adapters(owner)
            if len(found) < len(injection.adapted):  # a shared layer may go by another name
                gone = [name for name in injection.adapted if name not in found]
                raise LoRAError(
                    f"The adapter of {gone[0]!r} and {len(gone) - 1} more are gone: other layers have been put in the"
                    f" place of theirs since, by {type(trainer.precision_plugin).__name__} or the module's own code."
                    " Replace layers in `__init__`, `setup` or `configure_model`, before the adapters are put in."
                )


def check_trained(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Every adapter needs an optimizer, and no adapted weight may be trained besides."""
    optimized = {p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    for place in places(pl_module):
        name, adapter = place.name, place.adapter
        if place.weight.requires_grad:
            raise LoRAError(
                f"The weight of {name!r} was unfrozen after its adapter was put in. An adapted weight stays frozen; to"
                " train a module in full, name it in `modules_to_save`."
            )
        if not all(p.requires_grad for p in adapter.trained.values()):
            raise LoRAError(
                f"The adapter of {name!r} is frozen, so it would not be trained. Do not freeze the module after `setup`"
                " and `configure_model`: LoRA freezes the pretrained weights by itself."
            )
        if not all(p in optimized for p in adapter.trained.values()):
            raise LoRAError(
                f"No optimizer has the adapter of {name!r}. Make the optimizer in `configure_optimizers`, of"
                " `self.parameters()` or those of them that require gradients: it is called after the adapters are put"
                " in. A list made in `__init__` is older than they are, and so is what LightningCLI's `--optimizer`"
                " makes; there, let the module take an `OptimizerCallable`."
            )
