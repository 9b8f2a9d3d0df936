"""What LoRA refuses before a run, and what it checks before the first step: each by name, with what to do instead."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

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

from lightning_lora.errors import LoRAError, listed
from lightning_lora.injection.inject import Injection, adapters, places
from lightning_lora.injection.options import Options
from lightning_lora.trainer.namespaces import is_a
from lightning_lora.weights.sharded import is_shard

AVERAGED = (
    "it averages A and B into a module of its own, after training, and keeps no average in files; `WeightAveraging` and"
    " `EMAWeightAveraging` work, and checkpoints hold merged weights, which can be averaged"
)
REFUSED: Mapping[type[Callback], str] = {
    BaseFinetuning: "it freezes and unfreezes the parameters that LoRA has frozen; LoRA replaces it, with"
    " `modules_to_save` for what is to be trained in full",
    ModelPruning: "it rewrites the frozen weights while adapters are trained on them; prune the merged module after"
    " `fit`",
    StochasticWeightAveraging: AVERAGED,
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
    """Raise :class:`LoRAError` if the strategy, the precision or a callback of ``trainer`` cannot work with LoRA."""
    for strategy, reason in REFUSED_STRATEGIES.items():
        if is_a(trainer.strategy, strategy):
            raise LoRAError(f"LoRA does not support {type(trainer.strategy).__name__}: {reason}.")
    if not is_a(trainer.strategy, *SUPPORTED_STRATEGIES):
        raise LoRAError(
            f"LoRA does not support {type(trainer.strategy).__name__}, which may shard or wrap the module in its"
            f" own way. It supports {', '.join(strategy.__name__ for strategy in SUPPORTED_STRATEGIES)}."
        )
    for plugin, reason in REFUSED_PRECISIONS.items():
        if is_a(trainer.precision_plugin, plugin):
            raise LoRAError(f"LoRA does not support {plugin.__name__}: {reason}.")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, reason in REFUSED.items():
            if is_a(callback, kind):
                raise LoRAError(
                    f"LoRA cannot be combined with {type(callback).__name__}: {reason}. Remove one of them."
                )


def refuse_held_weights(options: Options, form: str) -> None:
    """Refuse files of adapters alone where the weights beside them hold the increments."""
    if form == "adapter" and options.gradient != "factored":
        raise LoRAError(
            f"`checkpoint='adapter'` needs frozen weights, and with `gradient={options.gradient!r}` they hold their"
            " increments. Use `checkpoint='merged'`, or `gradient='factored'`."
        )


def refuse_unsharded(strategy: ModelParallelStrategy, options: Options, form: str) -> None:
    """Refuse what cannot be done to sharded weights."""
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
    """Check that every adapter is sharded, so that its gradients are reduced over the processes."""
    for name, adapter in adapters(pl_module).items():
        if not all(is_shard(p) for p in adapter.trained.values()):
            raise LoRAError(
                f"The adapter of {name!r} is not sharded, so each process would train one of its own. In"
                f" `configure_model`, call `fully_shard` on {name!r} or a module round it, after `inject`."
            )


def check_complete(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Check that the file just loaded into a sharded module has all but the adapters."""
    if trainer.ckpt_path is None or not os.path.isfile(trainer.ckpt_path):
        return  # a folder is asked for everything
    in_file = torch.load(trainer.ckpt_path, mmap=True, map_location="cpu", weights_only=True)["state_dict"]
    factors = tuple(place.factors for place in places(pl_module))
    if missing := [key for key in pl_module.state_dict() if key not in in_file and not key.startswith(factors)]:
        raise KeyError(f"{trainer.ckpt_path} has no {missing[0]!r}, nor {len(missing) - 1} more keys of the module.")


def check_there(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Check that no adapted layer has been replaced, as a precision plugin can do after all hooks that come before."""
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


def check_trained(trainer: pl.Trainer, pl_module: pl.LightningModule, idle: Iterable[str]) -> None:
    """Check that every adapter but those in ``idle`` has an optimizer, and that no adapted weight is trained.

    Raises:
        LoRAError: If one is not trained, or its weight is.
    """
    optimized = {p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    for place in places(pl_module):
        name, trained = place.name, place.adapter.trained.values()
        if place.weight.requires_grad:
            raise LoRAError(unfrozen(name))
        if not all(p.requires_grad for p in trained):
            raise LoRAError(frozen_adapter(name))
        if name not in idle and not all(p in optimized for p in trained):
            raise LoRAError(no_optimizer([name], pl_module))


def no_optimizer(names: list[str], module: pl.LightningModule) -> str:
    """Return what to do about adapters that no optimizer trains."""
    return (
        f"No optimizer has the weights of {listed(names)}, so their adapters would not be trained. Give these weights"
        " to an optimizer in `configure_optimizers`, or leave the modules out by"
        f" `exclude_modules={[names[0]]}`, as unused ones, teachers and target networks."
    )


def unfrozen(name: str) -> str:
    """Return what to do about an adapted weight that requires a gradient."""
    return (
        f"The weight of {name!r} was unfrozen after its adapter was put in. An adapted weight stays frozen; to train a"
        " module in full, name it in `modules_to_save`."
    )


def frozen_adapter(name: str) -> str:
    """Return what to do about an adapter whose weight was frozen by the module's own code."""
    return (
        f"The adapter of {name!r} is frozen, so it would not be trained. Do not freeze the module after `setup` and"
        " `configure_model`: LoRA freezes the pretrained weights by itself."
    )


def unreached(names: list[str]) -> str:
    """Return what to do about adapters that no gradient reached in the first batch."""
    return (
        f"No gradient reached the adapters of {listed(names)} in the first batch. They stay at zero unless later"
        f" batches use these modules; if none does, `exclude_modules={[names[0]]}`. If a reentrant activation"
        " checkpoint is round them, use `use_reentrant=False`: a frozen input gives it no gradient to pass on."
    )


def refuse_second_callback(trainer: pl.Trainer, kind: type) -> None:
    """Refuse two callbacks of ``kind``."""
    if sum(isinstance(callback, kind) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
        raise LoRAError(
            "The Trainer has two LoRA callbacks, and each would freeze what the other trains. Use one:"
            " `target_modules` may name modules anywhere, with `rank_pattern` and `alpha_pattern` for those that"
            " differ."
        )


def explain(exception: BaseException, hidden: bool) -> str | None:
    """Return what to do about an exception that code of the module's own raised over A and B, or frozen weights.

    Args:
        exception: Of the first batches.
        hidden: Whether A and B are not among the module's parameters.
    """
    if not isinstance(exception, RuntimeError | AssertionError | KeyError | ValueError):
        return None
    said = f"{type(exception).__name__}: {exception}".rstrip(": ") + ". "
    if "does not require grad" in said:
        return said + (
            "If an activation checkpoint of the module's own asks autograd for the gradients of frozen weights, use"
            " `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)` in its place."
        )
    by_name = isinstance(exception, KeyError | AssertionError)
    pairs = ("must match the size", "shape", "zip()", "same number of tensors")
    if hidden and "empty" in said:
        return said + (
            "If this code goes through the `parameters()` that require gradients, as perturbations by hand do: A and B"
            " are not among them here. Use `gradient='factored'`, in which they are."
        )
    if by_name and hidden:
        return said + (
            "If this code goes by `requires_grad`, as shadows do: LoRA freezes the pretrained weights. Use"
            " `EMAWeightAveraging` with `gradient='factored'` in its place."
        )
    if by_name or (not hidden and any(hint in said for hint in pairs)):
        return said + (
            "If this code goes through `parameters()` or their names, as momentum and target networks do: A and B are"
            " among them with `gradient='factored'`. Use `gradient='merged'`, in which the module has its own"
            " parameters and names; for an average of what is trained, `EMAWeightAveraging`."
        )
    return None
