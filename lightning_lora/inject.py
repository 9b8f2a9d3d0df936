"""Options and a module in, hosts with adapters out, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_lora import targets
from lightning_lora.adapters import Adapter
from lightning_lora.hosts import LinearHost, host_mixin, swap, unswap
from lightning_lora.hosts.linear import is_transposed
from lightning_lora.options import Options


@dataclasses.dataclass(frozen=True)
class Injection:
    """What was done to a module, kept on it as ``lora_injection`` until it is undone."""

    options: Options
    adapted: list[str]
    trained: list[str]
    """Parameters of the base that are trained in full."""
    frozen: list[str]
    """Parameters that were trainable and are not now."""
    thawed: list[str]
    """Parameters that were not trainable and are now."""
    unnested: list[str]
    """``nn.TransformerEncoder``s whose use of nested tensors, a fast path round the adapters, was turned off."""


def inject(module: nn.Module, **options: Any) -> list[str]:
    """Freezes ``module`` and puts an adapter into every layer that ``options`` target.

    For Fabric and plain torch; with a Trainer, :class:`~lightning_lora.LoRA` does it. The module computes what it did
    before, bit for bit, until the adapters are trained.

    Args:
        module: Any module whose weights exist.
        **options: Those of :class:`~lightning_lora.LoRA`, but for what concerns checkpoints.

    Returns:
        The names of the adapted modules.

    Raises:
        TypeError: If there is no such option.
        ValueError: If an option has a bad value, or matches nothing in ``module``.
        MisconfigurationException: If ``module`` has adapters already, or a target cannot carry one.
        In each case ``module`` is as it was.
    """
    return inject_options(module, Options(**options)).adapted


def inject_options(module: nn.Module, options: Options) -> Injection:
    """:func:`inject` for options that have been validated."""
    if present := adapters(module):
        raise MisconfigurationException(
            f"{type(module).__name__} has adapters already, in {next(iter(present))!r} and {len(present) - 1} more."
            " `merge` it before injecting again."
        )
    found = targets.resolve(module, options)
    made = {
        name: Adapter.initial(
            target.weight,  # type: ignore[arg-type]
            options.rank_of(name),
            options.seed,
            name,
            options.dtype,
            scale=options.scale_of(name),
            dropout=options.dropout,
            transposed=is_transposed(target),
        )
        for name, target in found.modules.items()
    }
    flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    adapted = set(found.modules.values())
    encoders = {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, nn.TransformerEncoder) and not adapted.isdisjoint(child.modules())
    }
    injection = Injection(
        options=options,
        adapted=list(made),
        trained=found.trained,
        frozen=[name for name, flag in flags.items() if flag and name not in found.trained],
        thawed=[name for name in found.trained if not flags[name]],
        unnested=[name for name, encoder in encoders.items() if encoder.use_nested_tensor],
    )

    for name, target in found.modules.items():
        target.lora = made[name]
        swap(target, host_mixin(target))
    _set_flags(module, injection, adapted=True)
    module.lora_injection = injection  # type: ignore[assignment]
    return injection


def merge(module: nn.Module) -> None:
    """Folds every increment into its weight and makes ``module`` plain again: classes, keys, ``requires_grad``.

    Args:
        module: One that has adapters, injected into it or into modules inside it.

    Raises:
        ValueError: If ``module`` has no adapters.
    """
    if not adapters(module):
        raise ValueError(f"{type(module).__name__} has no adapters to merge.")
    for host in _hosts(module).values():
        weight = host._parameters["weight"]
        assert weight is not None
        with torch.no_grad():
            weight.copy_(host.lora.folded_into(weight))
        unswap(host)
        del host.lora
    for owner in module.modules():
        if (injection := owner.__dict__.pop("lora_injection", None)) is not None:
            _set_flags(owner, injection, adapted=False)


def adapters(module: nn.Module) -> dict[str, Adapter]:
    """The adapters in ``module``: name of the module that carries it -> adapter with ``A``, ``B``, ``scale``."""
    return {name: host.lora for name, host in _hosts(module).items()}


def injections(module: nn.Module) -> Iterator[Injection]:
    """What :func:`inject` did to ``module`` and to modules inside it."""
    for owner in module.modules():
        if isinstance(injection := owner.__dict__.get("lora_injection"), Injection):
            yield injection


def trained_besides(module: nn.Module) -> list[str]:
    """Names of the base's parameters that are trained in full, under every name that a shared one has.

    ``requires_grad`` alone does not tell: ``toggle_optimizer`` clears it for the parameters of the other optimizers.
    """
    chosen = {
        owner.get_parameter(name)
        for owner in module.modules()
        if isinstance(injection := owner.__dict__.get("lora_injection"), Injection)
        for name in injection.trained
    }
    factors = {p for adapter in adapters(module).values() for p in adapter.parameters()}
    named = module.named_parameters(remove_duplicate=False)
    return [name for name, p in named if p in chosen or (p.requires_grad and p not in factors)]


def _hosts(module: nn.Module) -> dict[str, LinearHost]:
    return {name: child for name, child in module.named_modules() if isinstance(child, LinearHost)}


def _set_flags(module: nn.Module, injection: Injection, adapted: bool) -> None:
    for names, flag in ((injection.frozen, not adapted), (injection.thawed, adapted)):
        for name in names:
            module.get_parameter(name).requires_grad_(flag)
    for name in injection.unnested:
        setattr(module.get_submodule(name), "use_nested_tensor", not adapted)  # noqa: B010
