"""Options and a module in, hosts with adapters out, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_lora import targets
from lightning_lora.adapters import Adapter
from lightning_lora.hosts import (
    Host,
    ParameterHost,
    is_transposed,
    read_names,
    stacks,
    swap,
    unswap,
    zero_factor,
)
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


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an adapter stands in a module."""

    name: str
    """Of the host, where its ``weight`` is adapted, else of the parameter."""
    key: str
    """Of the weight in the module's state."""
    factors: str
    """Before the keys of A and B in the module's state."""
    host: Host
    adapter: Adapter
    weight: Tensor


def inject(module: nn.Module, **options: Any) -> list[str]:
    """Freezes ``module`` and puts an adapter into every layer that ``options`` target.

    For Fabric and plain torch; with a Trainer, :class:`~lightning_lora.LoRA` does it. The module computes what it did
    before, bit for bit, until the adapters are trained.

    Args:
        module: Any module whose weights exist.
        **options: Those of :class:`~lightning_lora.LoRA`, but for what concerns checkpoints.

    Returns:
        The names of what is adapted: of modules, where their ``weight`` is, else of parameters.

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
    made: dict[str, Adapter] = {}
    for target in found.adapted:
        if target.name not in made:
            made[target.name] = _make(target, options)
    flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    hosts = {target.module for target in found.adapted}
    encoders = {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, nn.TransformerEncoder) and not hosts.isdisjoint(child.modules())
    }
    injection = Injection(
        options=options,
        adapted=list(made),
        trained=found.trained,
        frozen=[name for name, flag in flags.items() if flag and name not in found.trained],
        thawed=[name for name in found.trained if not flags[name]],
        unnested=[name for name, encoder in encoders.items() if encoder.use_nested_tensor],
    )

    owners: dict[str, list[targets.Target]] = {}
    for target in found.adapted:
        owners.setdefault(target.owner, []).append(target)
    for own in owners.values():
        host = own[0].module
        if any(target.mixin is ParameterHost for target in own):
            host.lora = nn.ModuleDict({target.parameter: made[target.name] for target in own})
            swap(host, ParameterHost, read_names(host, [target.parameter for target in own]))
        else:
            host.lora = made[own[0].name]
            swap(host, own[0].mixin)
    _set_flags(module, injection, adapted=True)
    module.lora_injection = injection  # type: ignore[assignment]
    return injection


def _make(target: targets.Target, options: Options) -> Adapter:
    return Adapter.initial(
        target.weight,
        options.rank_of(target.name),
        options.seed,
        target.name,
        options.dtype,
        stacked=stacks(target.module, target.weight),
        scale=options.scale_of(target.name),
        dropout=options.dropout,
        transposed=is_transposed(target.module),
        zero=zero_factor(target.module),
    )


def merge(module: nn.Module) -> None:
    """Folds every increment into its weight and makes ``module`` plain again: classes, keys, ``requires_grad``.

    Args:
        module: One that has adapters, injected into it or into modules inside it.

    Raises:
        ValueError: If ``module`` has no adapters.
    """
    if not adapters(module):
        raise ValueError(f"{type(module).__name__} has no adapters to merge.")
    found = list({id(place.adapter): place for place in places(module)}.values())
    hosts = [child for child in module.modules() if isinstance(child, Host)]
    with torch.no_grad():
        for place in found:
            if not place.host.holds_increment:
                place.weight.copy_(place.adapter.folded_into(place.weight))
    for host in hosts:
        unswap(host)
        del host.lora
    for owner in module.modules():
        if (injection := owner.__dict__.pop("lora_injection", None)) is not None:
            _set_flags(owner, injection, adapted=False)


def adapters(module: nn.Module) -> dict[str, Adapter]:
    """The adapters in ``module``: name -> adapter with ``A``, ``B``, ``scale`` and ``delta_weight()``.

    The name is that of the module whose ``weight`` is adapted, or of any other parameter.
    """
    found: dict[int, tuple[str, Adapter]] = {}
    for place in places(module, remove_duplicate=True):
        found.setdefault(id(place.adapter), (place.name, place.adapter))
    return dict(found.values())


def places(module: nn.Module, remove_duplicate: bool = False) -> Iterator[Place]:
    """Every place of an adapter in ``module``; one in a module or a weight that stands in two places has two."""
    for prefix, host in module.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(host, Host):
            dot = f"{prefix}." if prefix else ""
            for parameter, adapter in host.adapted().items():
                weight = host._parameters[parameter]
                assert weight is not None
                yield Place(
                    name=prefix if parameter == "weight" and prefix else f"{dot}{parameter}",
                    key=f"{dot}{parameter}",
                    factors=f"{dot}{host.factors(parameter)}",
                    host=host,
                    adapter=adapter,
                    weight=weight,
                )


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


def _set_flags(module: nn.Module, injection: Injection, adapted: bool) -> None:
    for names, flag in ((injection.frozen, not adapted), (injection.thawed, adapted)):
        for name in names:
            owner, _, key = name.rpartition(".")
            parameter = module.get_submodule(owner)._parameters[key]  # the attribute may be a property
            assert parameter is not None
            parameter.requires_grad_(flag)
    for name in injection.unnested:
        setattr(module.get_submodule(name), "use_nested_tensor", not adapted)  # noqa: B010
